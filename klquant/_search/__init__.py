"""The threshold search: the divergence of every candidate in closed form.

**Symbols.** A candidate keeps a window of w bins. P is the window with all outliers added to its end bins; S is the
window without its first bin and without outliers. L groups of ``m = w // L`` bins partition the window; the last one
also takes the remainder. Over group j, A_j is the sum of S, M_j the sum of P, and N_j the number of bins with P != 0.
C is the sum of P, which is that of the histogram, and U the sum of S. Smoothing gives eps to every zero and takes e_p
from every other entry of P, e_q from every other entry of Q.

**The formula.** Q has one value on all non-empty bins of a group, so its logarithm leaves the sum over the group::

    D = (1/C) [ sum_{k: P_k > 0} (P_k - e_p) log(P_k - e_p) - sum_j (M_j - e_p N_j) log(q_j) ] + log(U / C)
    q_j = A_j / N_j - e_q where A_j > 0, else eps

Normalising P by C and Q by U adds log(U / C) to every log(p / q), and p sums to 1. A bin with P = 0 is eps on both
sides and adds no more than that.

**Where each part is computed.** All but the last two take O(1) a candidate:

- ``prefix_sums``: A, M and N of any range of bins, as differences of running sums.
- ``candidates``: the windows, e_p, e_q, U, and the first and last group of each candidate.
- ``closed_form``: the first sum (the self term) and the first and last group of the second (the end terms).
- ``chains``: all other groups of the second sum (the cross term), L - 2 additions and a few logarithms a candidate.
- ``bin_by_bin``: one term for each bin, where a series below would converge too slowly, and for near-ties.

**Error budget**, in nats, for n = 8001 bins and L = 255 levels; ``u = 2**-53`` is the rounding of float64::

    series in e_p / h <= 1/32, 10 terms         rest x^10 / 90 + ...                        1.1e-17
    series in d / (A/N - e) <= 2e-3, 4 terms    rest x^5 / 5 + ...                          6.4e-15
    logarithms and products                     (2 + 2 W) u in each sum                     5e-15
    running sums of the self term               over n / 2 bins, from the centre outwards:
                                                2 sqrt(n / 2) u W                           1.4e-13
    chains of the cross term                    L - 3 additions in a row: (L - 3) u W       2.8e-13

W = sum p |log h| is the size of the numbers that are added up. It is at most log(n) + 1/e + log(2) = 10.1, because the
search counts in a unit of its own, the power of two at or below the mean count of the non-empty bins. All counts stay
exact. The unit is free, since the weights of the logarithms add up to C - e_p r in both sums, where r is the number of
non-zero P.

The worst case is 4.4e-13, and below 1e-12 up to 2**16 bins. Most roundings cancel. Compared with exact rational
arithmetic, on sparse, spiked, heavy-tailed, dense and random histograms of 257 to 12001 bins, the error was at most
2e-14; compared with the sum bin by bin, on up to 16001 bins, 3e-14 with NumPy and 8e-14 with JAX.
``tests/core/test_threshold.py`` and ``property_tests/test_threshold_props.py`` assert 1e-12; 1e-13 where the search
changes from series to single bins; and 5e-14 behind a bin of 2**58.

Counts are exact. Weights are rounded to 2**-108 of the total, so a group's term is off by up to 2**-108 N_j M_j / A_j.
This exceeds 1e-12 only for a first or last group with less than about 1e-21 of the total beside outliers.
"""
