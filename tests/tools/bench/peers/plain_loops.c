/* The threshold search as one would write it in C: for every candidate a pass over all its bins, O(n^2), float64. */
#include <math.h>
#include <stdint.h>

typedef int64_t i64;

/* Zeros become eps at the cost of the others; returns the new total, or 0 where that is infeasible. */
static double smooth(double *values, i64 width, double eps)
{
    i64 filled = 0;
    for (i64 k = 0; k < width; k++)
        filled += values[k] != 0;
    double loss = filled ? eps * (double)(width - filled) / (double)filled : 1;
    if (loss >= 1)
        return 0;
    double total = 0;
    for (i64 k = 0; k < width; k++) {
        values[k] = values[k] == 0 ? eps : values[k] - loss;
        if (values[k] <= 0)
            return 0;
        total += values[k];
    }
    return total;
}

/* The window with the outliers added to its end bins. */
static void fill_reference(const i64 *hist, i64 num_bins, i64 start, i64 stop, double *p)
{
    i64 left = 0, right = 0;
    for (i64 k = 0; k <= start; k++)
        left += hist[k];
    for (i64 k = stop - 1; k < num_bins; k++)
        right += hist[k];
    for (i64 k = start; k < stop; k++)
        p[k - start] = (double)hist[k];
    p[0] = (double)left;
    p[stop - start - 1] = (double)right;
}

/* Each group's total, without the first bin of the window, spread evenly over the bins where p is not 0. */
static void fill_candidate(const i64 *window, const double *p, i64 width, i64 levels, double *q)
{
    i64 size = width / levels;
    for (i64 j = 0; j < levels; j++) {
        i64 low = j * size, high = j < levels - 1 ? low + size : width, total = 0, filled = 0;
        for (i64 k = low; k < high; k++) {
            total += k > 0 ? window[k] : 0;
            filled += p[k] != 0;
        }
        for (i64 k = low; k < high; k++)
            q[k] = p[k] != 0 ? (double)total / (double)filled : 0;
    }
}

/* `p` and `q` are room for num_bins numbers each. */
void divergence_curve(const i64 *hist, i64 num_bins, i64 levels, double eps, double *p, double *q, double *curve)
{
    i64 centre = num_bins / 2;
    for (i64 half = levels / 2; half <= centre; half++) {
        i64 start = centre - half, stop = centre + half + 1, width = stop - start;
        fill_reference(hist, num_bins, start, stop, p);
        fill_candidate(hist + start, p, width, levels, q);
        double p_total = smooth(p, width, eps), q_total = smooth(q, width, eps), sum = 0;
        for (i64 k = 0; p_total > 0 && q_total > 0 && k < width; k++)
            sum += p[k] * log(p[k] / q[k]);
        curve[half - levels / 2] =
            p_total > 0 && q_total > 0 ? sum / p_total + log(q_total / p_total) : INFINITY;
    }
}
