"""Files are written whole or not at all, errors name them, and damaged files are refused."""

import errno
import os
import resource

import numpy as np
import pytest

from klquant.backends.files import temporary_folder, write_atomic
from klquant.backends.npz import load_npz, save_npz
from klquant.errors import InvalidInputError


@pytest.fixture
def full_disk():
    """Let no file become larger than 1 KiB, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_does_not_fit_leaves_the_old_one_and_is_named(tmp_path, full_disk):
    path = tmp_path / "file"
    write_atomic(path, b"first")
    with pytest.raises(OSError, match=f"'{path}'") as caught:
        write_atomic(path, bytes(2000))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, folder):
    (tmp_path / "file").write_bytes(b"here")
    with pytest.raises(NotADirectoryError, match=f"'{tmp_path / folder / 'c'}'"):
        write_atomic(tmp_path / folder / "c", b"")
    assert (tmp_path / "file").read_bytes() == b"here"


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "c").mkdir()
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path / 'c'}'$"):
        write_atomic(tmp_path / "c", b"")
    assert [*tmp_path.iterdir()] == [tmp_path / "c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("of no number")])
def test_other_errors_come_through_and_leave_nothing(tmp_path, monkeypatch, error):
    def fails(handle):
        raise error

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(type(error)) as caught:
        write_atomic(tmp_path / "c", b"")
    assert caught.value is error
    assert [*tmp_path.iterdir()] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the archive's, as it is deleted
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_interrupts_the_packing_is_not_replaced(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("zipfile._get_compressor", fails)
    with pytest.raises(error):
        save_npz(tmp_path / "c", "calibration", 1, {}, {"a": np.zeros(3)})
    assert [*tmp_path.iterdir()] == []


def test_a_folder_for_temporary_files_is_removed_after_an_error(tmp_path):
    def use():
        with temporary_folder(tmp_path) as folder:
            (folder / "below").mkdir()
            (folder / "below" / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert [*tmp_path.iterdir()] == []


def test_modes_are_what_the_user_says(tmp_path):
    before = os.umask(0o027)
    write_atomic(tmp_path / "c", b"")
    os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640


def read(path):
    """Return what is in a file, or what is wrong with it."""
    try:
        meta, arrays = load_npz(path, "kind", 1)
        return meta["a"], {name: array.tolist() for name, array in arrays.items()}
    except InvalidInputError as error:
        return str(error)


def test_no_damage_of_a_byte_passes_unseen(tmp_path):
    path = tmp_path / "c.npz"
    save_npz(path, "kind", 1, {"a": 1}, {"x": np.arange(5)})
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        found = read(path)
        assert found == (1, {"x": [0, 1, 2, 3, 4]}) or found.startswith(f"`{path}` must be a klquant kind file")


def test_what_is_no_archive_is_called_that_and_not_a_pickle(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"text")
    with pytest.raises(InvalidInputError, match="got a damaged or foreign one: File is not a zip file"):
        load_npz(tmp_path / "c.npz", "kind", 1)
