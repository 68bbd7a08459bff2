"""The options of a calibration, and those of single layers by name pattern."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import translate
from sys import float_info
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, get_args

from klquant.errors import InvalidInputError

from .plugins import Kind, installed

Engine: TypeAlias = Literal["tensorrt", "onnxruntime", "openvino"]
Observe: TypeAlias = Literal["inputs", "outputs"]
Criterion: TypeAlias = Literal["entropy", "max", "percentile", "mse"]
CriterionOrAuto: TypeAlias = Literal["entropy", "max", "percentile", "mse", "auto"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
ENGINES: tuple[Engine, ...] = get_args(Engine)
MAX_ONE_PASS = 3**16  # largest range of a single pass
MAX_BINS = 2**16 + 1  # the cost of a search grows with the square
EXCLUDED = "excluded by the settings"  # why a layer, node or tensor is skipped
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # the operators of ONNX that have weights


ALIASES = {
    "kl": "entropy",
    "kld": "entropy",
    "kullback-leibler": "entropy",
    "minmax": "max",
    "min-max": "max",
    "min_max": "max",
    "absmax": "max",
    "amax": "max",
    "ort": "onnxruntime",
    "onnx": "onnxruntime",
    "trt": "tensorrt",
    "ov": "openvino",
}
"""What other tools call criteria and engines."""


def check_engine(engine: str) -> None:
    """Raise InvalidInputError for an unknown engine."""
    check_choice("engine", engine, ENGINES)


def check_choice(name: str, given: object, choices: Iterable[str], kind: Kind | None = None) -> None:
    """Raise InvalidInputError, which lists the choices and the nearest one, for anything else.

    With a `kind`, what other packages add is a choice too.
    """
    listed = list(choices)
    if given not in listed and kind is not None:
        listed += installed(kind)
    if given not in listed:
        raise InvalidInputError(
            f"`{name}` must be one of {', '.join(listed)}, got {given!r}{did_you_mean(given, listed)}"
        )


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'max'?``, or nothing if no choice is near."""
    listed, text = list(choices), str(given).lower()
    close = [ALIASES[text]] if ALIASES.get(text) in listed else get_close_matches(text, listed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class LayerOptions(NamedTuple):
    """Options of one layer; None means that of the whole calibration."""

    criterion: Criterion | None = None
    """How T is chosen."""
    num_bits: int | None = None
    """Of activations and weights: 2 to 16, and 8 for INT8."""
    observe: Observe | None = None
    """Whether to quantize the input or the output of the layer."""
    threshold: float | None = None
    """T itself, in units of the activation; there is no search then."""
    min_ratio: float | None = None
    """Smallest T / amax that the entropy criterion may choose."""
    percentile: float | None = None
    """Percentage of the non-zero values that the percentile criterion does not clip."""

    def over(self, general: "LayerOptions") -> "LayerOptions":
        """Return these options, with the general ones where these are None."""
        mine = {name: value for name, value in self._asdict().items() if value is not None}
        return general._replace(**mine)

    def check(self, where: str) -> None:
        """Raise InvalidInputError for an impossible value; `where` ends the name in the message."""
        criteria: tuple[Any, ...] = (None, *CRITERIA)
        if self.criterion not in criteria:
            criteria += tuple(installed("criteria"))
        nearest = did_you_mean(self.criterion, criteria[1:])
        wanted = {
            "criterion": (self.criterion in criteria, f"one of {', '.join(criteria[1:])}"),
            "num_bits": (self.num_bits is None or (_is_int(self.num_bits) and 2 <= self.num_bits <= 16), "2 to 16"),
            "observe": (self.observe in (None, *get_args(Observe)), "'inputs' or 'outputs'"),
            "threshold": (self.threshold is None or 0 < self.threshold <= float_info.max, "positive and finite"),
            "min_ratio": (self.min_ratio is None or 0 <= self.min_ratio <= 1, "between 0 and 1"),
            "percentile": (self.percentile is None or 0 < self.percentile <= 100, "above 0 and at most 100"),
        }
        for name, (fine, what) in wanted.items():
            if not fine:
                hint = nearest if name == "criterion" else ""
                raise InvalidInputError(f"`{name}`{where} must be {what}, got {getattr(self, name)!r}{hint}")


class LayerOptionsDict(TypedDict, total=False):
    """:class:`LayerOptions` as a dict."""

    criterion: Criterion | None
    num_bits: int | None
    observe: Observe | None
    threshold: float | None
    min_ratio: float | None
    percentile: float | None


class SettingsOptions(TypedDict, total=False):
    """Keyword arguments that make :class:`Settings`."""

    observe: Observe
    num_bins: int
    num_bits: int
    max_amax: float | None
    passes: int
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    overrides: Mapping[str, LayerOptions | LayerOptionsDict]
    dead_channel: float
    guard: bool


_BESIDE = ("criterion", "num_batches", "progress", "forward", "resume", "equalize", "correct_bias", "batches", "engine")
"""Options beside the settings, which a misspelt one may mean."""


class Settings(NamedTuple):
    """Options of a calibration, saved with it."""

    observe: Observe = "inputs"
    num_bins: int = 4001
    num_bits: int = 8
    max_amax: float | None = None
    passes: int = 2
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, LayerOptions] = {}
    dead_channel: float = 0.0
    """Largest |weight| below which a channel is dead, besides channels of zeros; 1e-4 in the original description."""
    guard: bool = True
    """Whether the entropy criterion gives way to a better one where it clips too much."""

    @classmethod
    def make(cls, **given: Unpack[SettingsOptions]) -> "Settings":
        """Return settings that are checked; patterns are one string or several, overrides dicts or LayerOptions."""
        options: dict[str, Any] = {**given}
        if unknown := options.keys() - set(cls._fields):
            nearest = did_you_mean(min(unknown), (*cls._fields, *_BESIDE))
            raise InvalidInputError(f"settings must be among {', '.join(cls._fields)}, got {sorted(unknown)}{nearest}")
        for name in ("include", "exclude"):
            patterns: Any = options.get(name, cls._field_defaults[name])
            if not isinstance(patterns, Iterable):
                raise InvalidInputError(f"`{name}` must be a name pattern or several, got {patterns!r}")
            options[name] = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for pattern in (*options["include"], *options["exclude"]):
            if not isinstance(pattern, str):
                raise InvalidInputError(f"patterns must be strings, got {pattern!r:.80}")
        options["overrides"] = {k: _layer_options(k, v) for k, v in dict(options.get("overrides", {})).items()}
        settings = cls(**options)
        settings.general().check("")
        if not _is_int(settings.num_bins) or settings.num_bins % 2 == 0 or settings.num_bins < 255:
            raise InvalidInputError(f"`num_bins` must be odd and at least 255, got {settings.num_bins}")
        if settings.num_bins > MAX_BINS:
            raise InvalidInputError(f"`num_bins` must be at most {MAX_BINS}, got {settings.num_bins}")
        if settings.max_amax is not None and not 0 < settings.max_amax <= float_info.max:
            raise InvalidInputError(f"`max_amax` must be positive and finite, got {settings.max_amax}")
        if not 0 <= settings.dead_channel <= float_info.max:
            raise InvalidInputError(f"`dead_channel` must be 0 or positive, and finite, got {settings.dead_channel}")
        if not isinstance(settings.guard, bool):
            raise InvalidInputError(f"`guard` must be True or False, got {settings.guard!r:.80}")
        if settings.passes not in (1, 2):
            raise InvalidInputError(f"`passes` must be 1 or 2, got {settings.passes}")
        if settings.passes == 1 and (settings.max_amax or 0) > MAX_ONE_PASS:
            raise InvalidInputError(f"`max_amax` must be at most {MAX_ONE_PASS} with one pass, got {settings.max_amax}")
        return settings

    def general(self) -> LayerOptions:
        """Return the options of layers without overrides."""
        return LayerOptions(num_bits=self.num_bits, observe=self.observe)

    def as_json(self) -> dict[str, Any]:
        """Return a dict for JSON; ``Settings.make(**settings.as_json())`` equals the settings."""
        return {**self._asdict(), "overrides": {k: v._asdict() for k, v in self.overrides.items()}}

    def with_bits(self, num_bits: int | None) -> "Settings":
        """Return these settings, with another number of bits unless it is None; overrides keep theirs."""
        return self if num_bits is None else Settings.make(**{**self._asdict(), "num_bits": num_bits})

    def resolve(self, names: Iterable[str]) -> dict[str, LayerOptions]:
        """Return the options of every layer that will be quantized; the last override that matches wins."""
        names = list(names)
        included = matching(names, self.include) - matching(names, self.exclude)
        chosen = [name for name in names if name in included]
        options = dict.fromkeys(chosen, self.general())
        for pattern, override in self.overrides.items():
            options |= {name: override.over(options[name]) for name in matching(names, [pattern]) & included}
        return options

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise InvalidInputError for a pattern that matches no layer: it is probably misspelt."""
        names = list(names)
        for pattern in (*self.include, *self.exclude, *self.overrides):
            if names and not matching(names, [pattern]):
                close = get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise InvalidInputError(f"pattern `{pattern}` matches none of {len(names)} layers, such as {close}")


_OPERAND = re.compile(r"(.*:\w+\.\d+)\.\w+|(.+)@\d+")  # `block:matmul.0.other`, `head.conv@1`


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that a pattern matches; one that is itself a name, such as `block[0]/fc`, matches only that.

    A pattern for a call of a function matches its operands, too; one for a layer, each of the layer's calls.
    """
    known, patterns = set(names), list(patterns)
    expression = re.compile("|".join(translate(pattern) for pattern in patterns if pattern not in known) or r"(?!)")
    return {name for name in known if name in patterns or any(map(expression.match, (name, *_whole(name))))}


def _whole(name: str) -> list[str]:
    """Return the name of the call or layer that a name is a part of."""
    found = _OPERAND.fullmatch(name)
    return [part for part in found.groups() if part] if found else []


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_options(pattern: str, options: Any) -> LayerOptions:
    if isinstance(options, Mapping):
        if unknown := options.keys() - set(LayerOptions._fields):
            raise InvalidInputError(
                f"options of `{pattern}` must be among {', '.join(LayerOptions._fields)}, got {sorted(unknown)}"
                f"{did_you_mean(min(unknown), LayerOptions._fields)}"
            )
        options = LayerOptions(**options)
    if not isinstance(options, LayerOptions):
        raise InvalidInputError(f"options of `{pattern}` must be a dict or LayerOptions, got {type(options).__name__}")
    options.check(f" of `{pattern}`")
    return options
