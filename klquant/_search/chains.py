"""The cross term over the interior groups (all but the first and last) of all candidates: residue chains.

For one merge factor m, an interior group of any candidate is a window [x, x + m) of the histogram, and the next group
of that candidate is [x + m, x + 2 m). So candidates i and i + m share all borders but the outermost, and the term of a
group is computed once for each x. It serves every candidate that has the group. A candidate then adds up L - 2 of
these terms, m apart: a chain. About (m + 1/2) L values of x serve the L / 2 candidates of m. That makes 2 m + 1
logarithms a candidate instead of L, and ``num_bins**2 / (2 L)`` in all.

In an interior group P = S, so M = A, and the term is (A - e_p N) log(A/N - e_q). It depends on the candidate through
e_p, in which it is linear, and through e_q. Take the smallest e_q of all candidates with this m, call it e, let
d = e_q - e, and expand log(A/N - e - d) in d. With A = N (A/N - e) + N e, the powers of d are multiplied by sums R_k
that contain neither e_p nor d, and can be chained::

    sum (A - e_p N) log(A/N - e_q) = sum A l - e_p sum N l - sum_{k >= 1} d^k / k [R_(k-1) + (e - e_p) R_k]
    l = log(A/N - e),   R_k = sum N / (A/N - e)^k,   R_0 = sum N

The series is cut after R_4. With x = d / (A/N - e) the rest of one group is at most (x^5 / 5) N |e - e_p|
+ (x^6 / 6) N (A/N - e), and x <= 2e-3. As e and e_p are at most A/N, that is 6.4e-15 of A or less.
"""

import functools
from types import ModuleType

from klquant._namespace import Array, empty_rows, map_rows, strided_sums, where_needed
from klquant._search.bin_by_bin import Search
from klquant._search.candidates import Layout
from klquant._search.prefix_sums import sliding_windows

TERMS = 4  # R_1 .. R_4
SERIES_LIMIT = 2e-3  # the largest d / (A/N - e) for which the series is used
TINY = 1e-60  # a level below it weighs nothing, or belongs to candidates that are evaluated bin by bin only


def interior_chains(search: Search, loss: Array, needed: Array, terms: int, *, xp: ModuleType) -> Array:
    """Return sum A l, sum N l, R_1 .. R_terms of every candidate, shape (2 + terms, candidates).

    `loss` holds e for each block. Blocks that are not `needed` may be left as zeros.
    """
    layout, blocks = search.layout, search.layout.blocks()

    def chains(number: Array, size: Array, base: Array, width: int, columns: int) -> Array:
        counts, filled = sliding_windows(search.sums, base, size, width, xp=xp)
        level = xp.fmax(counts / filled - loss[number], TINY)  # NaN for an empty window
        log = xp.log(level)
        table, into = empty_rows(2 + terms, width, xp=xp)
        rows = [xp.multiply(counts, log, **into[0]), xp.multiply(filled, log, **into[1])]
        for out in into[2:]:
            filled = xp.divide(filled, level, **out)
            rows.append(filled)
        return strided_sums(rows if table is None else table, size, layout.levels - 2, columns, xp=xp)

    def chains_if_needed(
        number: Array, size: Array, base: Array, width: int = blocks[0].width, columns: int = blocks[0].columns
    ) -> Array:
        compute = functools.partial(chains, number, size, base, width, columns)
        return where_needed(needed[number], compute, lambda: xp.zeros_like(loss, shape=(2 + terms, columns)), xp=xp)

    return map_rows(chains_if_needed, _arguments(layout), xp=xp).take(layout.columns(), axis=1, mode="clip")


@functools.lru_cache(maxsize=256)
def _arguments(layout: Layout) -> list[tuple[int, ...]]:
    """Return number, size and base of each block; and width and columns, if they are not the same for all."""
    rows: list[tuple[int, ...]] = [
        (k, block.size, block.base, block.width, block.columns) for k, block in enumerate(layout.blocks())
    ]
    return [row[:3] for row in rows] if layout.alike else rows
