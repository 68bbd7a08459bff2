"""Names of products that a user knows: the path of the parameter, the name scope, or else the primitive."""

from collections import Counter
from collections.abc import Sequence

from .paths import module_path
from .sites import Site


def name_sites(sites: Sequence[Site]) -> list[str]:
    """Return a unique name for each site.

    It is the name scope, if no other site has it and it says more than the path of the weight, as in ``stem``; else
    that path, as in ``layers.0``; else the scope, the module around the products that its operands come from, as in
    ``blocks.0.attention``, or the primitive. Equal names get a number.
    """
    scopes, used = Counter(site.scope for site in sites), Counter[str]()
    names = []
    for site in sites:
        name = _name(site, scopes[site.scope] == 1)
        names.append(f"{name}:{used[name]}" if used[name] else name)
        used[name] += 1
    return names


def _name(site: Site, alone: bool) -> str:
    path, scope = module_path(site.leaf), site.scope
    same = path and scope.replace("/", ".").endswith(path)
    if scope and alone and not same:
        return scope
    return path or scope or site.around or site.primitive
