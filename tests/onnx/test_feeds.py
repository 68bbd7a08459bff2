import numpy as np
import pytest
import torch
from onnx import helper

from klquant.backends.onnx.feeds import Input, few_samples, make_feed, read_inputs
from klquant.backends.onnx.model.graph import read_graph
from klquant.errors import InvalidInputError
from support.namespaces import JAX, needs_jax
from support.onnx_models import build

IMAGES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
IDS = np.arange(6, dtype=np.int64).reshape(2, 3)


def inputs(declared="float[n, 3, 4] images, int64[n, 3] ids", body="y = Identity(images)"):
    model = build(declared, "float y", body)
    return read_inputs(model, read_graph(model))


ONE = inputs("float[n, 3, 4] images")


def test_inputs_are_read_with_their_dtypes_and_sizes():
    images, ids = inputs()
    assert images == ("images", np.float32, ("n", 3, 4))
    assert ids == ("ids", np.int64, ("n", 3))


def test_sizes_may_be_unknown():
    model = build("float[n, 3] x", "float y", "y = Identity(x)")
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    model.graph.input.append(helper.make_tensor_value_info("any", 1, None))
    first, second = read_inputs(model, read_graph(model))
    assert first.shape == ("?", 3)
    assert second.shape is None
    feed = make_feed([np.zeros((5, 3), np.float32), np.zeros((1, 1, 1), np.float32)], [first, second])
    assert feed["any"].shape == (1, 1, 1)


def test_inputs_that_are_not_tensors_are_refused():
    model = build("float[n, 3] x", "float y", "y = Identity(x)")
    model.graph.input.append(helper.make_tensor_sequence_value_info("many", 1, None))
    with pytest.raises(InvalidInputError, match="input `many` must be a tensor, got sequence_type"):
        read_inputs(model, read_graph(model))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"images": x}])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy, pytest.param(JAX.asarray, marks=needs_jax)])
def test_one_input_may_come_in_any_form(wrap, library):
    feed = make_feed(wrap(library(IMAGES)), ONE)
    assert list(feed) == ["images"]
    assert isinstance(feed["images"], np.ndarray)
    np.testing.assert_array_equal(feed["images"], IMAGES, strict=True)


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"ids": b, "images": a}])
def test_several_inputs_come_by_position_or_name(wrap):
    feed = make_feed(wrap(IMAGES, IDS), inputs())
    np.testing.assert_array_equal(feed["images"], IMAGES)
    np.testing.assert_array_equal(feed["ids"], IDS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_floats_are_converted_to_floats(dtype):
    feed = make_feed(IMAGES.astype(dtype), ONE)
    np.testing.assert_array_equal(feed["images"], IMAGES, strict=True)


def test_overflow_gives_infinity_without_a_warning():
    assert np.isinf(make_feed(np.full((1, 3, 4), 1e300), ONE)["images"]).all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IMAGES, IDS.astype(np.int32)], "input `ids` must be int64, got int32"),
        ([IMAGES, IDS.astype(float)], "input `ids` must be int64, got float64"),
        ([IMAGES.astype(np.uint8), IDS], "input `images` must be float32, got uint8"),
        ([IMAGES.astype(complex), IDS], "input `images` must be float32, got complex128"),
        (["text", IDS], "input `images` must be float32, got <U4"),
        ([None, IDS], "input `images` must be float32, got object"),
        ([[[1.0], [1.0, 2.0]], IDS], "input `images` must be an array, got list: .*inhomogeneous"),
        ([torch.ones(2, 3, 4, requires_grad=True), IDS], "input `images` must be an array, got Tensor: .*grad"),
        ([IMAGES[0], IDS], r"input `images` must have shape \(n, 3, 4\), got \(3, 4\)"),
        ([IMAGES[:, :2], IDS], r"input `images` must have shape \(n, 3, 4\), got \(2, 2, 4\)"),
        (IMAGES, "expected 2 arrays, for inputs `images`, `ids`, got 1"),
        ([IMAGES, IDS, IDS], "expected 2 arrays, for inputs `images`, `ids`, got 3"),
        ({"images": IMAGES}, "expected all of the inputs `images`, `ids`, got none for `ids`"),
        ({"image": IMAGES, "ids": IDS}, "expected all of the inputs `images`, `ids`, got none for `images`"),
        ({"images": IMAGES, "ids": IDS, "mask": IDS}, "expected only the inputs `images`, `ids`, got `mask` too"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(batch, message):
    with pytest.raises(InvalidInputError, match=message):
        make_feed(batch, inputs())


def test_a_fixed_batch_size_is_kept():
    fixed = inputs("float[2, 3, 4] images")
    assert make_feed(IMAGES, fixed)["images"].shape == (2, 3, 4)
    with pytest.raises(InvalidInputError, match=r"input `images` must have shape \(2, 3, 4\), got \(1, 3, 4\)"):
        make_feed(IMAGES[:1], fixed)


@pytest.mark.parametrize(("shape", "expected"), [(("n", 2), [3, 1]), ((3, 2), [3, 3, 3, 3])])
def test_the_subset_is_four_samples_or_batches(shape, expected):
    feeds = [{"x": np.zeros((3, 2))} for _ in range(9)]
    found = few_samples(feeds, [Input("x", np.dtype("f"), shape)], 4)
    assert [len(feed["x"]) for feed in found] == expected
