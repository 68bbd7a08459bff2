import functools

import numpy as np
import pytest

from klquant import ArrayTypeError
from klquant._namespace import (
    array_namespace,
    compiled,
    count_truncated,
    enable_x64,
    first_and_number,
    first_true,
    from_numpy,
    is_concrete,
    least,
    most,
    repeat,
    running_sums,
    stack_rows,
    strided_sums,
    sum_selected,
)
from support.namespaces import JAX, NUMPY, import_torch, needs_jax


def library(xp):
    return array_namespace(x=xp.asarray(0))


def test_arrays_have_the_namespace_of_their_library(xp):
    seen = []

    def look(x, y):
        seen.append(array_namespace(x=x, y=y))
        return x

    xp.call(look, xp.asarray([1.0]), xp.asarray([2]))
    assert [namespace.__name__ for namespace in seen] == ["jax.numpy" if xp.is_jax else "numpy"]


def test_numpy_scalars_are_arrays():
    assert array_namespace(x=np.float32(1)) is np


@needs_jax
def test_mixed_libraries_are_refused_by_name():
    with pytest.raises(ArrayTypeError, match=r"`hist` from numpy, `edges` from jax"):
        array_namespace(hist=np.ones(3), edges=JAX.asarray(np.ones(4)))


@pytest.mark.parametrize(("value", "kind"), [([1, 2], "list"), (1.5, "float"), (None, "NoneType"), ((1,), "tuple")])
def test_arguments_that_are_not_arrays_are_refused(value, kind):
    with pytest.raises(ArrayTypeError, match=rf"`hist` must be a NumPy or JAX array, got {kind}; .*np\.asarray"):
        array_namespace(hist=value)


def test_a_torch_tensor_is_sent_to_the_backend():
    torch = import_torch()
    with pytest.raises(ArrayTypeError, match=r"got torch\.Tensor; .*klquant\.backends\.torch"):
        array_namespace(hist=torch.ones(3))


def test_only_tracers_are_not_concrete(xp):
    seen = []

    def look(x):
        seen.append(is_concrete(np.ones(2), x))
        return x

    xp.call(look, xp.asarray([1.0]))
    assert seen == [not xp.is_traced]


def test_a_kernel_runs_in_the_library_of_its_arrays(xp):
    double = compiled(lambda x, *, xp, times: xp.asarray(times) * x)
    result = xp.call(double, xp.asarray([1, 2**40]), times=2)
    assert xp.owns(result)
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, [2, 2**41])


def test_a_kernel_may_divide_by_zero(xp):
    divide = compiled(lambda x, *, xp: xp.where(x > 0, 1 / x, xp.inf))
    np.testing.assert_array_equal(xp.call(divide, xp.asarray([0.0, 2.0])), [np.inf, 0.5])


@needs_jax
def test_jax_compiles_once_per_shape_and_static_value():
    import jax

    traces = []

    @compiled
    def kernel(x, *, xp, k):
        traces.append((x.shape, k))
        return x + k

    for size, k in [(2, 1), (2, 1), (3, 1), (2, 5), (3, 1), (2, 5)]:
        jax.jit(functools.partial(kernel, k=k))(JAX.asarray(np.ones(size)))
    assert traces == [((2,), 1), ((3,), 1), ((2,), 5)]


@needs_jax
def test_jax_arrays_in_the_memory_of_the_cpu_are_not_compiled():
    import jax

    seen = []

    @compiled
    def kernel(x, *, xp):
        seen.append(xp.__name__)
        return x + 1, xp.float64(2)

    x = jax.numpy.arange(3)
    for argument in (x, jax.device_put(x, jax.devices("cpu")[0])):
        first, second = kernel(argument)
        assert JAX.owns(first, second)
        assert (first.dtype, first.shape, second.dtype, second.shape) == (np.int32, (3,), np.float64, ())
        assert first.tolist() == [1, 2, 3]
        assert first.committed == second.committed == argument.committed
    assert not first.weak_type
    assert not second.weak_type
    jax.jit(kernel)(x)
    jax.vmap(kernel)(x[None, :2])
    assert seen == ["numpy", "numpy", "jax.numpy", "jax.numpy"]


@needs_jax
def test_64_bit_types_do_not_change_the_global_configuration():
    import jax

    before = jax.config.jax_enable_x64
    with enable_x64():
        assert jax.numpy.asarray(2**40).dtype == np.int64
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize("dtype", ["int64", "float64", "float32", "int8"])
def test_from_numpy_keeps_the_dtype(eager, dtype):
    array = np.array([1, 2], dtype)
    moved = from_numpy(array, xp=library(eager))
    assert eager.owns(moved)
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved, array)


@pytest.mark.parametrize(
    ("clip", "values"), [(False, [2.5, -2.5, 0.4, -0.4, 1.0]), (True, [9, -1e300, 0.4, -0.4, 1.0])]
)
def test_products_are_rounded_towards_0_and_counted_in_64_bits(xp, clip, values):
    kernel = compiled(lambda x, factor, *, xp: count_truncated(x, factor, 3, clip=clip, xp=xp))
    counts = xp.call(kernel, xp.asarray(values, np.float64), xp.asarray(1.25))
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [1, 0, 0, 2, 1, 0, 1])


@pytest.mark.parametrize("width", [1, 30])
def test_terms_of_selected_indices_are_added(xp, width):
    @compiled
    def kernel(selected, *, xp):
        sizes = width * xp.arange(1, 301)

        def add(indices, begin, number):
            term = begin + xp.arange(number)
            return xp.where(term < sizes[indices, None], 0.5 * term, 0.0).sum(axis=1)

        return sum_selected(add, selected, sizes, 4000, xp=xp) * selected

    selected = np.arange(300) % 7 == 3
    sizes = width * np.arange(1, 301)
    result = xp.call(kernel, xp.asarray(selected))
    np.testing.assert_array_equal(result, np.where(selected, sizes * (sizes - 1) / 4, 0))
    np.testing.assert_array_equal(xp.call(kernel, xp.asarray(0 * selected > 0)), np.zeros(300))


def test_indices_that_are_not_selected_cost_nothing():
    seen = []

    def function(indices, begin, number):
        seen.append((indices.tolist(), int(begin), number))
        return indices * 1.0

    sum_selected(function, np.array([False, True, True, False, True]), np.array([1, 2, 2, 6, 10]), 9, xp=np)
    assert seen == [([4], 0, 10), ([1, 2], 0, 2)]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 21])
def test_strided_sums_add_up_every_stride_th_value(xp, length):
    stride, count = 3, 3
    columns = np.arange(2 * stride * (length + 1)).reshape(2, -1) ** 2.0

    @compiled
    def kernel(first, second, *, xp):
        rows = np.stack([first, second]) if xp is np else [first, second]
        return strided_sums(rows, stride, length, count, xp=xp)

    expected = [[sum(c[t + j * stride] for j in range(length)) for t in range(count)] for c in columns]
    np.testing.assert_array_equal(xp.call(kernel, *map(xp.asarray, columns)), expected)


def sums_of(xp, *columns):
    return [
        xp.call(compiled(lambda a, *, xp: running_sums(a[None], 2, xp=xp)[0]), xp.asarray(column)) for column in columns
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 10])
def test_running_sums_of_integers_are_exact(xp, length):
    values = np.arange(length) + 2**60 // length
    (sums,) = sums_of(xp, values)
    assert np.asarray(sums).tolist() == [0, *np.cumsum(values).tolist(), values.sum(), values.sum()]
    assert sums.dtype == np.int64


def test_running_sums_behind_a_huge_entry_lose_little_and_the_same_on_every_cpu(xp):
    values, counts = np.append(2.0**61, np.full(2500, 100.0)), np.ones(2501, np.int64)
    sums, numbers = sums_of(xp, values, counts)
    assert abs(int(sums[-1]) - (2**61 + 250_000)) <= 51 * 512  # added one by one, none of the hundreds would count
    assert on_a_gpu(sums) or np.asarray(sums).tobytes() == sums_of(NUMPY, values)[0].tobytes()  # there in parallel
    assert int(numbers[-1]) == 2501


def on_a_gpu(array):
    return not isinstance(array, np.ndarray) and {device.platform for device in array.devices()} == {"gpu"}


def test_the_first_true_is_found(xp):
    kernel = compiled(lambda mask, *, xp: first_true(mask, xp=xp))
    assert int(xp.call(kernel, xp.asarray([False, True, False, True]))) == 1
    assert int(xp.call(kernel, xp.asarray([False, False]))) == 2
    kernel = compiled(lambda mask, *, xp: xp.stack(first_and_number(mask, xp=xp)))
    assert np.asarray(xp.call(kernel, xp.asarray([False, True, False, True]))).tolist() == [1, 2]


def test_the_extremes_along_an_axis(xp):
    table = np.array([[3.0, -1.0, 2.0], [np.nan, 1.0, np.inf]])
    for axis in (0, 1):
        kernel = compiled(lambda x, *, xp, axis: xp.stack([least(x, axis, xp=xp), most(x, axis, xp=xp)]))
        extremes = xp.call(kernel, xp.asarray(table), axis=axis)
        np.testing.assert_array_equal(extremes, [table.min(axis), table.max(axis)])


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_rows_are_stacked_in_order(xp, rows):
    kernel = compiled(lambda x, *, xp: stack_rows([x + k for k in range(rows)], xp=xp))
    np.testing.assert_array_equal(xp.call(kernel, xp.asarray([0.0, 0.5])), np.arange(rows)[:, None] + [0, 0.5])


def test_steps_are_repeated_as_often_as_an_array_says(xp):
    @compiled
    def powers(number, *, xp):
        return repeat(lambda k, state: (2 * state[0], state[1] + k), number, (xp.asarray(1), 0 * number), xp=xp)

    assert [int(value) for value in xp.call(powers, xp.asarray(5))] == [32, 10]
    assert [int(value) for value in xp.call(powers, xp.asarray(0))] == [1, 0]
