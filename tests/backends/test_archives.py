"""Archives that would take more than they should are refused before they are unpacked."""

import errno
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from klquant.backends import files, npz
from klquant.backends.files import MAX_TEXT, read_limited, write_atomic
from klquant.backends.npz import MAX_BYTES, load_npz, read_npz
from klquant.errors import InvalidInputError
from tools.fuzz import seeds

ZEROS = seeds.npy(np.zeros(2**20, np.uint8))


def claiming(size, **options):
    """Return an archive of zeros that says to unpack to `size` bytes."""
    archive = seeds.packed(a=ZEROS, **options)
    return archive.replace(len(ZEROS).to_bytes(4, "little"), size.to_bytes(4, "little"))


def refused(data, message):
    """Read an archive that must be refused, and without taking memory for it."""
    tracemalloc.start()
    with pytest.raises(Exception, match=message):
        read_npz(io.BytesIO(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18


def test_what_numpy_writes_is_read(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.float32(1.5), "c": np.zeros((0, 5)), "d": np.array([True])}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        with (tmp_path / "x.npz").open("rb") as file:
            np.testing.assert_equal(read_npz(file), arrays)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (claiming(2**31 - 2), f"arrays must have at most {MAX_BYTES} bytes in total, got 2147483646"),
        (seeds.packed(zipfile.ZIP_BZIP2, a=ZEROS), r"'a\.npy' must be stored or deflated"),
        (seeds.packed(zipfile.ZIP_LZMA, a=ZEROS), r"'a\.npy' must be stored or deflated"),
        (seeds.packed(a=ZEROS, b=ZEROS).replace(b"b.npy", b"a.npy"), "array names must be unique"),
    ],
    ids=["a bomb", "bzip2", "lzma", "the same member twice"],
)
def test_an_archive_that_would_unpack_to_too_much_is_refused(data, message):
    refused(data, message)


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", "(4294967296, 4294967296)", "(1" + "0" * 30 + ",)", "(-1,)", "(4,)"]
)
def test_an_array_that_claims_more_than_there_is_is_refused(shape):
    refused(seeds.packed(a=seeds.npy(shape=shape)), "an array of shape .* needs .* bytes, got 24")


@pytest.mark.parametrize("descr", ["'|O'", "'S0'", "'U3'", "'V1000000000'", "[('a', '<f8')]", "'<M8[s]'", "'<c16'"])
def test_an_array_of_anything_but_numbers_is_refused(descr):
    refused(seeds.packed(a=seeds.npy(descr=descr, shape="(1000000000000000000,)")), "an array must hold numbers, got ")


def test_an_array_of_another_version_of_the_format_is_refused():
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros(3), version=(2, 0))
    refused(seeds.packed(a=stream.getvalue()), r"arrays must be in version 1\.0 of the npy format, got 2\.0")


def test_an_error_of_the_disk_stays_one(tmp_path, monkeypatch):
    def fails(file):
        raise OSError(errno.EIO, "Input/output error")

    np.savez(tmp_path / "x.npz", a=np.ones(2))
    monkeypatch.setattr(npz, "read_npz", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load_npz(tmp_path / "x.npz", "x", 1)


def test_many_members_count_together(monkeypatch):
    monkeypatch.setattr(npz, "MAX_BYTES", 3 * len(ZEROS) - 1)
    assert list(read_npz(io.BytesIO(seeds.packed(a=ZEROS, b=ZEROS)))) == ["a", "b"]
    refused(seeds.packed(a=ZEROS, b=ZEROS, c=ZEROS), "bytes in total")


def test_what_is_hardly_compressed_may_be_large(monkeypatch):
    monkeypatch.setattr(npz, "MAX_BYTES", 0)
    noise = np.random.default_rng(0).normal(size=1000)
    np.testing.assert_array_equal(read_npz(io.BytesIO(seeds.packed(a=seeds.npy(noise))))["a"], noise)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"klquant": "x", "schema": NaN}', "NaN is not valid JSON"),
        (b" " * (MAX_TEXT + 1), f"JSON must have at most {MAX_TEXT} bytes, got {MAX_TEXT + 1}"),
    ],
    ids=["deep", "digits", "NaN", "long"],
)
def test_json_that_takes_too_much_is_refused(tmp_path, meta, message):
    np.savez_compressed(tmp_path / "x.npz", meta=np.frombuffer(meta, np.uint8))
    with pytest.raises(InvalidInputError, match=rf"x\.npz` must be a klquant x file.*{message}"):
        load_npz(tmp_path / "x.npz", "x", 1)


def test_json_of_the_usual_kind_is_read(tmp_path):
    meta = json.dumps({"klquant": "x", "schema": 1, "a": [1, 2.5, None]}).encode()
    np.savez(tmp_path / "x.npz", meta=np.frombuffer(meta, np.uint8), b=np.ones(2))
    found, arrays = load_npz(tmp_path / "x.npz", "x", 1)
    assert (found["a"], list(arrays)) == ([1, 2.5, None], ["b"])


def test_a_text_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT", 2**20)
    (tmp_path / "t").write_bytes(b"x" * 2**20)
    assert len(read_limited(tmp_path / "t")) == 2**20
    (tmp_path / "z").symlink_to("/dev/zero")
    with pytest.raises(InvalidInputError, match="z` must have at most 1 MiB of text, got more"):
        read_limited(tmp_path / "z")


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "other").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()
