"""What is known of a function without data: its products, their weights, and which of them are quantized."""

import hashlib
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klquant.errors import InvalidInputError

from ..calibration import Calibration, Fingerprint
from ..settings import EXCLUDED, LayerOptions, Settings, SettingsOptions
from .kernels import Levels, quantize_weight
from .model.arguments import Function, check_function, split
from .model.sites import Path, Site
from .model.tracing import Program, program_of
from .model.weights import evaluate_weights

NEVER_CALLED = "it was never called"


class Description(NamedTuple):
    """A function for inputs of certain shapes."""

    program: Program
    weights: dict[Path, Any]
    """Of the sites that have one, in floating point."""

    @property
    def dtypes(self) -> dict[str, Any]:
        """Return the dtype of every operand that may be quantized, by name."""
        sites = self.program.sites.values()
        return {name: site.equation.invars[k].aval.dtype for site in sites for k, name in site.tensors.items()}

    @property
    def fingerprint(self) -> dict[str, Fingerprint]:
        """Return what identifies each weight, by the name of its site."""
        return {site.name: _fingerprint(site, self.weights[path]) for path, site in self._weighted()}

    def quantized_weights(self, options: Mapping[str, LayerOptions], dead_channel: float) -> dict[str, Levels]:
        """Return the weights in integers, of the sites with options."""
        chosen = {path: site for path, site in self._weighted() if site.name in options}
        bits = {site.name: int(options[site.name].num_bits or 8) for site in chosen.values()}

        @jax.jit
        def quantized(weights: Mapping[str, Any]) -> dict[str, tuple[Levels, Any]]:
            sites = {site.name: site for site in chosen.values()}
            return {
                name: (quantize_weight(sites[name], weight, bits[name], dead_channel), jnp.isfinite(weight).all())
                for name, weight in weights.items()
            }

        found = quantized({site.name: self.weights[path] for path, site in chosen.items()})
        for name in bits:  # in the order of the sites
            if not found[name][1]:
                raise InvalidInputError(f"layer `{name}`: weights must be finite, got NaN or infinity")
        return {name: found[name][0] for name in bits}

    def num_bytes(self, names: Container[str]) -> int:
        """Return the size of these weights in floating point."""
        return sum(self.weights[path].nbytes for path, site in self._weighted() if site.name in names)

    def blank(self, settings: Settings) -> Calibration:
        """Return a calibration that has not seen data."""
        names = list(self.dtypes)
        settings.check_patterns(names)
        options = settings.resolve(names)
        if not options:
            opaque = [f"`{name}` is left out, as {reason}" for name, reason in self.program.opaque.items()]
            why = "it has none in floating point that depends on its inputs"
            why = f"{len(names)} are excluded" if names else "; ".join(opaque) or why
            raise InvalidInputError(f"expected a function with matrix products or convolutions, got none: {why}")
        weights = self.quantized_weights(options, settings.dead_channel)
        excluded = {name: EXCLUDED for name in names if name not in options}
        return Calibration.of(settings)._replace(
            model=self.fingerprint,
            skipped={**self.program.opaque, **excluded},
            weight_scales={name: scales_of(weight) for name, weight in weights.items()},
        )

    def _weighted(self) -> Sequence[tuple[Path, Site]]:
        return [(path, site) for path, site in self.program.sites.items() if path in self.weights]


def describe(function: Function, params: Any, inputs: tuple[Any, ...]) -> Description:
    """Return what is known of a function; only the shapes of the inputs matter."""
    check_function(function)
    program = program_of(function, params, inputs)
    sites = dict(program.sites)
    weights = jax.jit(lambda arrays: _by_name(sites, evaluate_weights(program.jaxpr, arrays, sites)))
    found = weights(split(params).arrays)
    return Description(program, {path: found[site.name] for path, site in sites.items() if site.name in found})


def settings_of(options: SettingsOptions) -> Settings:
    """Return the settings; operands are what enters a product, so `observe` has no meaning."""
    chosen = Settings.make(**options)
    if chosen.observe != "inputs" or any(layer.observe for layer in chosen.overrides.values()):
        raise InvalidInputError("`observe` has no meaning for JAX functions: what enters each product is observed")
    return chosen


def scales_of(weight: Levels) -> list[float]:
    """Return the scale of each output channel."""
    found: list[float] = np.asarray(weight.scale, np.float64).ravel().tolist()
    return found


def _by_name(sites: Mapping[Path, Site], weights: Mapping[Path, Any]) -> dict[str, Any]:
    return {sites[path].name: weight for path, weight in weights.items()}


def _fingerprint(site: Site, weight: Any) -> Fingerprint:
    digest = hashlib.sha256(np.ascontiguousarray(np.asarray(weight)).tobytes())
    return Fingerprint(f"{site.primitive}{weight.shape} {weight.dtype}", digest.hexdigest())
