"""Which grid an activation gets: symmetric by the rule of an engine, or [low, high] with a zero point."""

import numpy as np
import pytest
from onnx import TensorProto

import klquant
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.qdq.grids import Grid, by_sign, make_grids, signed, slow_with_zero_points, unsigned
from klquant.backends.onnx.qdq.plan import EVERYONE, Plan
from klquant.backends.ranges import Candidate, Range
from support.onnx_models import build

VALUES = np.random.default_rng(0).normal(size=20_000)


def candidate(low, high):
    """Return a tensor with values spread evenly from `low` to `high`."""
    return Candidate(Range(low, high), klquant.histogram(np.linspace(low, high, 5000)))


CANDIDATES = {"a": candidate(-0.3, 5.0), "b": candidate(-1.0, 2.0), "even": candidate(-4.0, 4.0)}


def grids(names, shared=(), rule=unsigned, non_negative=(), candidates=CANDIDATES, thresholds=None):
    plan = Plan({name: {EVERYONE} for name in names}, {}, list(shared), {})
    return make_grids(plan, thresholds or dict.fromkeys(names, 5.0), set(non_negative), rule, candidates)


@pytest.mark.parametrize("rule", [unsigned, by_sign])
def test_a_one_sided_tensor_has_a_zero_point(rule):
    assert grids("a", rule=rule)["a"] == Grid(5.0, 5.3 / 255, 14, TensorProto.UINT8)


@pytest.mark.parametrize("rule", [unsigned, by_sign])
def test_a_symmetric_tensor_has_the_grid_of_its_rule(rule):
    assert grids(["even"], rule=rule)["even"] == rule(5.0, False)


def test_a_tensor_without_a_candidate_has_the_grid_of_its_rule():
    assert grids("ac")["c"] == unsigned(5.0, False)
    assert grids("ac", [("a", "c")])["a"] == unsigned(5.0, False)


def test_tensors_that_are_never_negative_keep_all_levels_up_to_t():
    assert grids("a", non_negative="a")["a"] == unsigned(5.0, True)


def test_a_shared_grid_has_the_union_of_the_ranges():
    found = grids("ab", [("a", "b")])
    assert found["a"] == found["b"]
    assert found["a"].scale == 6.0 / 255
    assert found["a"].range == pytest.approx((-1.0, 5.0), abs=0.5 * 6 / 255)


def test_one_symmetric_tensor_makes_the_shared_grid_symmetric():
    assert grids(["a", "wide"], [("a", "wide")], candidates=CANDIDATES | {"wide": candidate(-5.0, 5.0)})["a"] == (
        unsigned(5.0, False)
    )


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (signed(127.0, False), (-128, 127)),
        (by_sign(255.0, True), (0, 255)),
        (unsigned(127.0, False), (-128, 127)),
        (Grid(5.0, 0.5, 10, TensorProto.UINT8), (-5.0, 122.5)),
    ],
)
def test_the_range_of_a_grid_is_that_of_its_integers(grid, expected):
    assert grid.range == expected


@pytest.mark.parametrize(
    ("layer", "slow"),
    [
        ("Conv<pads=[1,1,1,1]>(a, v)", True),
        ('Conv<auto_pad="SAME_UPPER">(a, v)', True),
        ("Conv(a, v)", False),
        ("Conv<pads=[1,1,1,1], group=4>(a, d)", False),
        ("Conv(a, a)", True),
        ("ConvTranspose(a, v)", True),
        ("MatMul(a, m)", True),
        ("MatMul(a, a)", True),
        ("Sigmoid(a)", False),
    ],
)
def test_where_zero_points_cost_time_in_openvino(layer, slow):
    constants = {"v": (4, 4, 3, 3), "d": (4, 1, 3, 3), "m": (8, 8)}
    used = {name: value for name, value in constants.items() if f", {name})" in layer}
    graph = read_graph(build("float[4, 4, 8, 8] x", "float y", f"a = Relu(x) y = {layer}", **used))
    assert ("a" in slow_with_zero_points(graph)) == slow
