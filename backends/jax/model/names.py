"""Names of products that a user knows: the path of the parameter, the name scope, or else the primitive."""

from collections import Counter
from collections.abc import Sequence

from .sites import Site

_VALUES = {"value", "raw_value"}  # the last part of a path in flax.nnx
_WEIGHTS = {"kernel", "weight", "weights", "w", "W", "embedding"}  # what comes before it, or is last elsewhere
_COLLECTIONS = {"params", "param"}  # the first part of a path in flax.linen


def name_sites(sites: Sequence[Site]) -> list[str]:
    """Return a unique name for each site.

    It is the name scope, if no other site has it and it says more than the path of the weight, as in ``stem``; else
    that path, as in ``layers.0``; else the scope or the primitive. Equal names get a number.
    """
    scopes, used = Counter(site.scope for site in sites), Counter[str]()
    names = []
    for site in sites:
        name = _name(site, scopes[site.scope] == 1)
        names.append(f"{name}:{used[name]}" if used[name] else name)
        used[name] += 1
    return names


def _name(site: Site, alone: bool) -> str:
    path, scope = _module_path(site.leaf), site.scope
    same = path and scope.replace("/", ".").endswith(path)
    if scope and alone and not same:
        return scope
    return path or scope or site.primitive


def _module_path(leaf: str) -> str:
    """Return the path of a module from that of its weight: ``Dense_0`` of ``params.Dense_0.kernel``."""
    parts = leaf.split(".")
    if parts[0] in _COLLECTIONS and len(parts) > 1:
        parts = parts[1:]
    for last in (_VALUES, _WEIGHTS):
        parts = parts[:-1] if len(parts) > 1 and parts[-1] in last else parts
    return ".".join(parts)
