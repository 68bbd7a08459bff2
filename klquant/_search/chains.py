"""The interior groups of all candidates, in O(1) a candidate: residue chains.

For one merge factor m the groups of all candidates, but their first and last ones, are windows [x, x + m) of the
histogram with x advancing by m. So whatever is summed over interior groups is computed once for every x, and a
candidate's sum runs over L - 2 of these values, m apart.

What is summed depends on the candidate through e_q and e_p, which smoothing takes from the bins. e_q is split into
the smallest e of the candidates with this m and a rest d, and log(A/N - e - d) is expanded in d::

    sum (A - e_p N) log(A/N - e_q) = sum A l - e_p sum N l - sum_k d^k / k [R_(k-1) + (e - e_p) R_k]
    l = log(A/N - e),   R_k = sum N / (A/N - e)^k

Each merge factor costs (m + 1) L logarithms, num_bins^2 / (2 L) in all.
"""

import functools
from types import ModuleType

from klquant._namespace import Array, fixed_shapes, map_rows, strided_sums, where_needed
from klquant._search.bin_by_bin import Search
from klquant._search.prefix_sums import sliding_windows

TERMS = 4  # R_1 .. R_4: with d / (A/N - e) up to SERIES_LIMIT the error is below 1e-14 of the counts
SERIES_LIMIT = 2e-3
TINY = 1e-60


def interior_chains(search: Search, loss: Array, needed: Array, unit: Array, terms: int, *, xp: ModuleType) -> Array:
    """Return sum A l, sum N l, R_1 .. R_terms of every candidate, shape (2 + terms, candidates).

    `loss` holds e for each block; blocks that are not `needed` may be zeros.
    """
    levels, alone = search.layout.levels, not fixed_shapes(xp=xp)

    def chains(number: Array, size: Array, base: Array, width: int, columns: int) -> Array:
        counts, filled = sliding_windows(search.sums, base, size, width, xp=xp)
        level = counts / filled - loss[number]  # NaN of an empty window
        level = xp.where(level > TINY, level, unit)  # these, and weights that only coarse candidates hold
        log = xp.log(level / unit)
        values = [counts * log, filled * log]
        for _ in range(terms):
            filled = filled / level
            values.append(filled)
        return strided_sums(values, size, levels - 2, columns, xp=xp)

    def chains_if_needed(number: Array, size: Array, base: Array, width: int, columns: int) -> Array:
        compute = functools.partial(chains, number, size, base, width, columns)
        return where_needed(needed[number], compute, (2 + terms, columns), xp=xp)

    pieces, number = [], 0
    for blocks, width, columns in search.layout.block_groups(alone=alone):
        table = [(number + k, block.size, block.base) for k, block in enumerate(blocks)]
        found = map_rows(functools.partial(chains_if_needed, width=width, columns=columns), table, xp=xp)
        for chain, block in zip(found, blocks, strict=True):
            narrow_first = chain[:, : block.candidates][:, ::-1]
            alike = columns == 1 < block.candidates
            pieces.append(xp.broadcast_to(narrow_first, (2 + terms, block.candidates)) if alike else narrow_first)
        number += len(blocks)
    return xp.concatenate(pieces, axis=1)
