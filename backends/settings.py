"""What can be chosen: for a whole calibration, and for single layers by name pattern."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase, translate
from sys import float_info
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from klquant.errors import InvalidInputError

Engine: TypeAlias = Literal["tensorrt", "onnxruntime", "openvino"]
Observe: TypeAlias = Literal["inputs", "outputs"]
Criterion: TypeAlias = Literal["entropy", "max", "percentile", "mse"]
CriterionOrAuto: TypeAlias = Literal["entropy", "max", "percentile", "mse", "auto"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
ENGINES: tuple[Engine, ...] = get_args(Engine)
MAX_AMAX = 204800.0  # against absurd outliers
MAX_ONE_PASS = 3**16  # up to where the ranges grow of which one pass finds the right one
MAX_BINS = 2**16 + 1  # a search takes their square
EXCLUDED = "excluded by the settings"  # why a layer, node or tensor is skipped
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # the operators of ONNX that have weights


def check_engine(engine: str) -> None:
    """Raise InvalidInputError for an unknown engine."""
    if engine not in get_args(Engine):
        raise InvalidInputError(f"`engine` must be one of {', '.join(get_args(Engine))}, got {engine!r}")


class LayerOptions(NamedTuple):
    """What holds for one layer; None leaves it to the settings of the whole calibration."""

    criterion: Criterion | None = None
    """How T is chosen."""
    num_bits: int | None = None
    """Of activations and weights, 2 to 16: 8 for INT8."""
    observe: Observe | None = None
    """Whether what enters the layer is quantized, or what leaves it."""
    threshold: float | None = None
    """T itself, in units of the activation; no search is made."""
    min_ratio: float | None = None
    """Floor on T / amax of the entropy criterion."""
    percentile: float | None = None
    """Percent of the non-zero values that are not clipped, of the percentile criterion."""

    def over(self, general: "LayerOptions") -> "LayerOptions":
        """Return these options, filled up with the general ones."""
        mine = {name: value for name, value in self._asdict().items() if value is not None}
        return general._replace(**mine)

    def check(self, where: str) -> None:
        """Refuse what cannot be meant, naming where it was said."""
        wanted = {
            "criterion": (self.criterion in (None, *CRITERIA), f"one of {', '.join(CRITERIA)}"),
            "num_bits": (self.num_bits is None or (_is_int(self.num_bits) and 2 <= self.num_bits <= 16), "2 to 16"),
            "observe": (self.observe in (None, *get_args(Observe)), "'inputs' or 'outputs'"),
            "threshold": (self.threshold is None or 0 < self.threshold <= float_info.max, "positive and finite"),
            "min_ratio": (self.min_ratio is None or 0 <= self.min_ratio <= 1, "between 0 and 1"),
            "percentile": (self.percentile is None or 0 < self.percentile <= 100, "above 0 and at most 100"),
        }
        for name, (fine, what) in wanted.items():
            if not fine:
                raise InvalidInputError(f"`{name}`{where} must be {what}, got {getattr(self, name)!r}")


class Settings(NamedTuple):
    """What a calibration is asked to do; saved with it."""

    observe: Observe = "inputs"
    num_bins: int = 4001
    num_bits: int = 8
    max_amax: float = MAX_AMAX
    passes: int = 2
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, LayerOptions] = {}
    dead_channel: float = 0.0
    """Largest |weight| below which a channel is dead, besides channels of zeros; 1e-4 in the original description."""

    @classmethod
    def make(cls, **options: Any) -> "Settings":
        """Return checked settings; patterns may be one string or several, overrides dicts or LayerOptions."""
        if unknown := options.keys() - set(cls._fields):
            raise InvalidInputError(f"settings must be among {', '.join(cls._fields)}, got {sorted(unknown)}")
        for name in ("include", "exclude"):
            patterns: Any = options.get(name, cls._field_defaults[name])
            if not isinstance(patterns, Iterable):
                raise InvalidInputError(f"`{name}` must be a name pattern or several, got {patterns!r}")
            options[name] = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for pattern in (*options["include"], *options["exclude"]):
            if not isinstance(pattern, str):
                raise InvalidInputError(f"patterns must be text, got {pattern!r:.80}")
        options["overrides"] = {k: _layer_options(k, v) for k, v in dict(options.get("overrides", {})).items()}
        settings = cls(**options)
        settings.general().check("")
        if not _is_int(settings.num_bins) or settings.num_bins % 2 == 0 or settings.num_bins < 255:
            raise InvalidInputError(f"`num_bins` must be odd and at least 255, got {settings.num_bins}")
        if settings.num_bins > MAX_BINS:
            raise InvalidInputError(f"`num_bins` must be {MAX_BINS} at most, got {settings.num_bins}")
        if not 0 < settings.max_amax <= float_info.max:
            raise InvalidInputError(f"`max_amax` must be positive and finite, got {settings.max_amax}")
        if not 0 <= settings.dead_channel <= float_info.max:
            raise InvalidInputError(f"`dead_channel` must be 0 or positive, and finite, got {settings.dead_channel}")
        if settings.passes not in (1, 2):
            raise InvalidInputError(f"`passes` must be 1 or 2, got {settings.passes}")
        if settings.passes == 1 and settings.max_amax > MAX_ONE_PASS:
            raise InvalidInputError(f"`max_amax` must be {MAX_ONE_PASS} at most with one pass, got {settings.max_amax}")
        return settings

    def general(self) -> LayerOptions:
        """Return what holds for layers without options of their own."""
        return LayerOptions(num_bits=self.num_bits, observe=self.observe)

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold; ``Settings.make(**that)`` is these settings again."""
        return {**self._asdict(), "overrides": {k: v._asdict() for k, v in self.overrides.items()}}

    def with_bits(self, num_bits: int | None) -> "Settings":
        """Return these settings, with another general number of bits if one is given."""
        return self if num_bits is None else Settings.make(**{**self._asdict(), "num_bits": num_bits})

    def resolve(self, names: Iterable[str]) -> dict[str, LayerOptions]:
        """Return the options of every layer that is to be quantized; of overrides that match the last one wins."""
        names = list(names)
        included, excluded = _any_of(self.include), _any_of(self.exclude)
        chosen = [name for name in names if included.match(name) and not excluded.match(name)]
        options = dict.fromkeys(chosen, self.general())
        for pattern, override in self.overrides.items():
            options |= {name: override.over(options[name]) for name in chosen if fnmatchcase(name, pattern)}
        return options

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse a pattern that matches no layer: it is misspelt."""
        names = list(names)
        for pattern in (*self.include, *self.exclude, *self.overrides):
            if names and not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise InvalidInputError(f"pattern `{pattern}` matches none of {len(names)} layers, such as {close}")


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return the expression for names that one of the patterns matches; without patterns for none."""
    return re.compile("|".join(map(translate, patterns)) or r"(?!)")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_options(pattern: str, options: Any) -> LayerOptions:
    if isinstance(options, Mapping):
        if unknown := options.keys() - set(LayerOptions._fields):
            raise InvalidInputError(
                f"options of `{pattern}` must be among {', '.join(LayerOptions._fields)}, got {sorted(unknown)}"
            )
        options = LayerOptions(**options)
    if not isinstance(options, LayerOptions):
        raise InvalidInputError(f"options of `{pattern}` must be a dict or LayerOptions, got {type(options).__name__}")
    options.check(f" of `{pattern}`")
    return options
