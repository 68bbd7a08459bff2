"""Calibration data from `--data`: every form is re-iterable, read one batch at a time, and never unpickled."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from klquant.cli import data as data_module
from klquant.cli.data import Amount, load_arrays, open_batches
from klquant.cli.images import ImageOptions
from klquant.errors import InvalidInputError
from support.onnx_models import build
from tools.fuzz import seeds

SAMPLES = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Seven samples, one in each file; the names do not sort as they were written."""
    for k in reversed(range(7)):
        np.save(tmp_path / f"{k}.npy", SAMPLES[k])
    return tmp_path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the module `mydata` into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text):
        (tmp_path / "mydata.py").write_text(text)
        monkeypatch.delitem(sys.modules, "mydata", raising=False)
        return "mydata:batches"

    yield write
    sys.modules.pop("mydata", None)


def twice(batches):
    """Iterate over the batches twice, as a calibration does."""
    first, second = list(batches), list(batches)
    np.testing.assert_equal(first, second)
    assert len(first) == len(second)
    return first


def test_each_file_of_a_folder_is_one_batch_by_name(folder):
    batches = open_batches(str(folder))
    assert len(batches) == 7
    np.testing.assert_array_equal(np.stack(twice(batches)), SAMPLES)


def test_with_a_batch_size_each_file_is_one_sample(folder):
    batches = twice(open_batches(str(folder), Amount(3)))
    assert [batch.shape for batch in batches] == [(3, 2, 3), (3, 2, 3), (1, 2, 3)]
    np.testing.assert_array_equal(np.concatenate(batches), SAMPLES)


def test_files_are_opened_one_at_a_time_when_their_turn_comes(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(data_module.np, "load", lambda file, **_: opened.append(Path(file.name).name) or SAMPLES[0])
    batches = iter(open_batches(str(folder)))
    assert opened == []
    next(batches)
    next(batches)
    assert opened == ["0.npy", "1.npy"]


def test_arrays_of_an_npz_file_keep_their_names(tmp_path):
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", a=SAMPLES[k], b=SAMPLES[k] > 0)
    batches = twice(open_batches(str(tmp_path)))
    assert [list(batch) for batch in batches] == [["a", "b"]] * 3
    first, last = open_batches(str(tmp_path), Amount(2))
    np.testing.assert_array_equal(first["a"], SAMPLES[:2])
    np.testing.assert_array_equal(last["b"], SAMPLES[2:3] > 0)


def test_one_npz_file_is_split_and_the_last_batch_is_ragged(tmp_path):
    np.savez(tmp_path / "data.npz", a=SAMPLES, b=np.arange(7))
    batches = twice(open_batches(str(tmp_path / "data.npz"), Amount(3)))
    assert [list(map(len, batch.values())) for batch in batches] == [[3, 3], [3, 3], [1, 1]]
    np.testing.assert_array_equal(np.concatenate([batch["a"] for batch in batches]), SAMPLES)
    np.testing.assert_array_equal(np.concatenate([batch["b"] for batch in batches]), np.arange(7))
    assert len(open_batches(str(tmp_path / "data.npz"), Amount(default_size=4))) == 2


@pytest.mark.parametrize(("name", "save"), [("one.npy", np.save), ("one.npz", np.savez)])
def test_an_array_without_a_name_goes_without_one(tmp_path, name, save):
    save(tmp_path / name, SAMPLES)
    batches = twice(open_batches(str(tmp_path / name), Amount(4)))
    np.testing.assert_array_equal(np.concatenate(batches), SAMPLES)


def test_a_single_npy_file_stays_on_the_disk(tmp_path):
    np.save(tmp_path / "one.npy", SAMPLES)
    assert isinstance(load_arrays(tmp_path / "one.npy", mapped=True), np.memmap)
    batch = open_batches(str(tmp_path / "one.npy"))[0]
    assert type(batch) is np.ndarray
    assert batch.flags.writeable


def test_a_slice_of_batches_is_batches(folder):
    part = open_batches(str(folder))[2:4]
    np.testing.assert_array_equal(np.stack(twice(part)), SAMPLES[2:4])


def test_a_function_is_called_once_for_each_pass(module):
    source = module("calls = []\ndef batches():\n    calls.append(1)\n    yield from [[1, 2], [3]]\n")
    batches = open_batches(source)
    assert twice(batches) == [[1, 2], [3]]
    assert sys.modules["mydata"].calls == [1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`batches` must be a function of `mydata`, got None"),
        ("batches = 3", "`batches` must be a function of `mydata`, got 3"),
        ("1 / 0", r"`mydata` cannot be imported: ZeroDivisionError: division by zero \(.*mydata\.py, line 1\)"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_function_that_is_not_there_is_a_named_error(module, text, message):
    with pytest.raises(InvalidInputError, match=message):
        open_batches(module(text))


def test_an_error_in_a_function_is_reported_with_its_line(module):
    batches = open_batches(module("def batches():\n    yield 1\n    raise KeyError('label')\n"))
    with pytest.raises(InvalidInputError, match=r"`mydata:batches` failed: KeyError: 'label' \(.*mydata\.py, line 3\)"):
        list(batches)


def test_a_batch_size_with_a_function_is_refused(module):
    with pytest.raises(InvalidInputError, match="`--batch-size` must be left out with a function"):
        open_batches(module("def batches(): return []"), Amount(2))


def test_a_module_that_is_not_there_is_a_named_error(module):
    message = "`no_such_module` cannot be imported: ModuleNotFoundError: No module named 'no_such_module'$"
    with pytest.raises(InvalidInputError, match=message):
        open_batches("no_such_module:batches")


@pytest.mark.parametrize("source", ["nowhere", "", "no/such/folder", "C:\\calib\\images", "D:/calib/x.npz"])
def test_a_source_that_is_not_there_is_a_named_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(InvalidInputError, match=r"must be a folder, an \.npy or \.npz file or module:function, got"):
        open_batches(source or str(tmp_path / "nothing"))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.txt").write_text("1 2 3")
    with pytest.raises(InvalidInputError, match=r"must be a folder, .* got `.*data\.txt`"):
        open_batches(str(tmp_path / "data.txt"))


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(InvalidInputError, match="got 0 array files and 0 images"):
        open_batches(str(tmp_path))


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(tmp_path / "bomb.npz", x=np.array([Bomb()], dtype=object))
    (tmp_path / "bomb.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.npz", "bomb.npy"):
        with pytest.raises(InvalidInputError, match=rf"{name}` must be a NumPy file of numbers"):
            load_arrays(tmp_path / name)


def test_an_error_of_the_disk_stays_one(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    np.save(tmp_path / "a.npy", SAMPLES)
    monkeypatch.setattr(data_module.np, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load_arrays(tmp_path / "a.npy")


@pytest.mark.parametrize("data", list(seeds.bombs()))
@pytest.mark.parametrize("mapped", [True, False])
def test_an_array_that_claims_to_be_more_than_it_is_is_refused(tmp_path, data, mapped):
    (tmp_path / "bomb.npy").write_bytes(data)
    with pytest.raises(InvalidInputError, match=r"bomb\.npy` must be"):
        load_arrays(tmp_path / "bomb.npy", mapped=mapped)


@pytest.mark.parametrize("data", list(seeds.zip_bombs()))
def test_an_archive_that_claims_to_be_more_than_it_is_is_refused(tmp_path, data):
    (tmp_path / "bomb.npz").write_bytes(data)
    with pytest.raises(InvalidInputError, match=r"bomb\.npz` must"):
        load_arrays(tmp_path / "bomb.npz")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("array", seeds.arrays_of_nothing())
def test_many_samples_of_nothing_are_refused(tmp_path, suffix, array):
    (tmp_path / f"x.{suffix}").write_bytes(array if suffix == "npy" else seeds.packed(a=array))
    with pytest.raises(InvalidInputError, match=r"x\.np[yz]` must"):
        open_batches(str(tmp_path / f"x.{suffix}"))


@pytest.mark.parametrize("name", ["bad.npz", "bad.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"\x93NUMPY damaged"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"{name}` must be a NumPy file"):
        list(open_batches(str(tmp_path)))


@pytest.mark.parametrize(
    "arrays",
    [{"a": SAMPLES, "b": SAMPLES[:6]}, {"a": np.float32(1)}, {"a": SAMPLES, "b": np.float32(1)}, {"a": SAMPLES[:0]}],
    ids=["lengths", "scalar", "mixed", "empty"],
)
def test_one_file_needs_as_many_samples_of_each_input(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InvalidInputError, match=r"must have the same length along the first axis, got {'a': "):
        open_batches(str(tmp_path / "data.npz"))


@pytest.mark.parametrize("other", [SAMPLES[0, :1], {"a": SAMPLES[0]}], ids=["shape", "names"])
def test_samples_that_cannot_be_stacked_are_named(tmp_path, other):
    np.save(tmp_path / "0.npy", SAMPLES[0])
    np.savez(tmp_path / "1.npz", **other) if isinstance(other, dict) else np.save(tmp_path / "1.npy", other)
    with pytest.raises(
        InvalidInputError, match=r"same names and shapes, got different ones in `.*0\.npy` to `.*1\.np[yz]`"
    ):
        list(open_batches(str(tmp_path), Amount(2)))


@pytest.fixture
def pictures(tmp_path):
    """A red and a gray picture in a folder below."""
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    (tmp_path / "below").mkdir()
    image.new("RGB", (8, 4), (255, 0, 51)).save(tmp_path / "below" / "a.png")
    image.new("L", (5, 5), 102).save(tmp_path / "b.JPG", format="jpeg")
    return tmp_path


def test_pictures_are_resized_normalized_and_stacked(pictures):
    options = ImageOptions((2, 3), mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 0.1))
    batches = open_batches(str(pictures), images=options)
    (batch,) = twice(batches)
    assert batch.shape == (2, 3, 2, 3)
    assert batch.dtype == np.float32
    gray, red = batch
    np.testing.assert_allclose(red[:, 0, 0], [1.0, 0.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(gray[:, 1, 2], [-0.2, 0.4, 4.0], rtol=1e-6)
    last = open_batches(str(pictures), Amount(1), images=options._replace(layout="NHWC"))[1]
    np.testing.assert_array_equal(last, red.transpose(1, 2, 0)[None])


def test_pictures_need_a_size(pictures):
    with pytest.raises(InvalidInputError, match=r"`--image-size` must be given: .* contains 2 images"):
        open_batches(str(pictures), images=ImageOptions())


def test_a_damaged_picture_is_named(pictures):
    (pictures / "c.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(InvalidInputError, match=r"c\.png` must be an image"):
        list(open_batches(str(pictures), images=ImageOptions((2, 2))))


def test_only_pictures_of_the_kinds_that_are_named_are_opened(pictures):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    for form in ("eps", "gif"):
        image.new("RGB", (3, 3)).save(pictures / "c.png", format=form)
        with pytest.raises(InvalidInputError, match=r"c\.png` must be an image"):
            list(open_batches(str(pictures), images=ImageOptions((2, 2))))


def test_a_picture_of_too_many_pixels_is_refused(pictures, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InvalidInputError, match=r"must be an image.*(32|25) pixels"):
        list(open_batches(str(pictures), images=ImageOptions((2, 2))))


def test_pictures_beside_arrays_are_refused(pictures):
    np.save(pictures / "0.npy", SAMPLES)
    with pytest.raises(InvalidInputError, match="got 1 array files and 2 images"):
        open_batches(str(pictures), images=ImageOptions((2, 2)))


def test_the_order_of_channels_and_the_range_of_pixels(pictures):
    options = ImageOptions((2, 3), mean=(1.0, 2.0, 3.0), pixel_range=255, channels="BGR")
    (batch,) = open_batches(str(pictures), images=options)
    np.testing.assert_allclose(batch[1, :, 0, 0], [51 - 1, 0 - 2, 255 - 3])
    (grey,) = open_batches(str(pictures), images=ImageOptions((2, 3), channels="L"))
    assert grey.shape == (2, 1, 2, 3)
    assert grey[0, 0, 0, 0] == pytest.approx(0.4, abs=0.01)


def test_images_of_another_shape_are_cropped_or_padded(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255  # white in the middle
    image.fromarray(pixels).save(tmp_path / "a.png")
    found = {}
    for fit in ("stretch", "crop", "letterbox"):
        (batch,) = open_batches(str(tmp_path), images=ImageOptions((4, 4), fit=fit, pixel_range=255))
        found[fit] = batch[0, 0]
    assert found["crop"].min() == 255
    assert found["stretch"][:, [0, 3]].max() < 100
    np.testing.assert_array_equal(found["letterbox"][[0, 3]], 114)
    assert found["letterbox"][1:3].max() > 114


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ImageOptions((2, 2), mean=(123.7,)),
            "`--mean` must be for .* got 123.7; add --pixel-range 255",
        ),
        (ImageOptions((2, 2), std=(58.4, 57.1, 57.4)), "`--std` must be .* got 58.4,57.1,57.4; add --pixel-range 255"),
    ],
)
def test_a_mean_of_another_range_of_pixels_is_refused(pictures, options, message):
    with pytest.raises(InvalidInputError, match=message):
        open_batches(str(pictures), images=options)
    assert open_batches(str(pictures), images=options._replace(pixel_range=255))[0].shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    ("shape", "size", "channels", "layout"),
    [
        ("n, 3, 4, 6", (4, 6), "RGB", "NCHW"),
        ("n, 4, 6, 3", (4, 6), "RGB", "NHWC"),
        ("2, 1, 4, 6", (4, 6), "L", "NCHW"),
        ("n, 3, h, w", None, "RGB", "NCHW"),
        ("n, 5", None, None, None),
    ],
)
def test_what_is_missing_is_taken_from_the_model(shape, size, channels, layout):
    graph = build(f"float[{shape}] x", f"float[{shape}] y", "y = Relu (x)").graph
    found = ImageOptions().of_model(graph)
    assert (found.size, found.channels, found.layout) == (size, channels, layout)
    given = ImageOptions((9, 9), channels="BGR", layout="NHWC")
    assert given.of_model(graph) == given


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (ImageOptions((4, 6)), "rgb / 255, no mean / std, stretched to 4x6: inputs 0 .. 1"),
        (
            ImageOptions((4, 6), "crop", (127.5,), (128.0,), 255, "BGR"),
            "bgr, mean 127.5, std 128, cropped to 4x6: inputs -0.996 .. 0.996",
        ),
    ],
)
def test_the_options_are_described_in_a_line(options, text):
    assert str(options) == text


def test_samples_are_evenly_spaced(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(10))
    batches = list(open_batches(str(tmp_path / "one.npy"), Amount(3, max_samples=5)))
    assert [batch.tolist() for batch in batches] == [[0, 2, 4], [6, 8]]
    whole = open_batches(str(tmp_path / "one.npy"), Amount(4, whole=True))
    assert [batch.tolist() for batch in whole] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(open_batches(str(tmp_path / "one.npy"), Amount(default_size=8, min_batches=5))) == 5


def test_batches_end_with_the_last_sample_that_is_wanted(module, folder):
    source = module("def batches():\n    yield from [{'x': [1, 2]}, {'x': [3, 4]}, {'x': [5]}]\n")
    assert twice(open_batches(source, Amount(max_samples=3))) == [{"x": [1, 2]}, {"x": [3]}]
    source = module("def batches():\n    yield from [([1, 2], [3, 4]), ([5], [6])]\n")
    assert twice(open_batches(source, Amount(max_samples=1))) == [([1], [3])]
