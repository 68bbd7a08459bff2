"""Fuzz targets: for each loader, a function that takes bytes, loads them, and uses the result.

A target writes the bytes to a file, reads it, and uses the result. It may raise only KLQuantErrors.
"""

import contextlib
import io
import shutil
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from typing import NamedTuple

import numpy as np
from click.testing import CliRunner

from klquant.backends.calibration import Calibration
from klquant.backends.formats import FORMATS, CalibrationCache, read_table, write_table
from klquant.backends.report import describe, render_html
from klquant.backends.report.diagnosis import check_diagnosis
from klquant.cli.commands.report import _read_json
from klquant.cli.data import load_arrays, open_batches
from klquant.cli.group import cli
from klquant.cli.images import ImageOptions, load_image
from klquant.cli.output import print_table
from klquant.errors import KLQuantError

from . import seeds
from .mutation import mutate

OUTPUT = io.StringIO()  # one for all, because click keeps every standard output that it has seen


class Target(NamedTuple):
    """One fuzz target."""

    call: Callable
    """Called with the working folder and the bytes."""
    seeds: Callable
    """Called with the folder. Returns files to damage."""
    bombs: Callable = tuple
    """Returns files that are tried as they are, and sometimes damaged."""
    mutate: Callable = mutate
    seconds: float = 10.0
    """An input that takes longer is a failure."""
    mib: int = 1024
    """An input that takes more memory than this, in addition to the imports, is a failure."""


def calibration(folder, data):
    """Whatever loads is searched and saved, and the saved file loads as the same."""
    found = Calibration.load(_written(folder / "c.npz", data))
    found.save(folder / "again.npz")
    again = Calibration.load(folder / "again.npz")
    others = {"versions": {}, "histograms": {}}
    assert repr(again._replace(**others)) == repr(found._replace(**others))
    for name, histogram in found.histograms.items():
        assert all(map(np.array_equal, histogram, again.histograms[name]))
    for threshold in found.search_thresholds().values():
        assert 0 < threshold.threshold < np.inf


def checkpoint(folder, data):
    from klquant.backends.collection.checkpoint import Checkpoint

    kept = Checkpoint(_written(folder / "p.npz", data), "this model").start("amax")
    assert kept.statistics.num_batches >= 0


def report(folder, data):
    """Names, reasons and titles are text: they add no elements or attributes to the page."""
    found = Calibration.load(_written(folder / "c.npz", data))
    page = _Elements()
    page.feed(render_html(describe(found, title=next(iter(found.amax), ""))))
    assert page.found <= _known_elements(folder), page.found - _known_elements(folder)


def table(folder, data, *, kind=None, suffix=""):
    """Whatever is read can be written, and reads as the same again."""
    found = read_table(_written(folder / f"t{suffix}", data), format=kind)
    assert found
    write_table(folder / "again", found, format="json")
    assert read_table(folder / "again") == found


def tensorrt_cache(folder, data):
    cache = CalibrationCache.load(_written(folder / "t.cache", data))
    cache.save(folder / "again")
    assert CalibrationCache.load(folder / "again") == cache


def npz(folder, data):
    _use(open_batches(str(_written(folder / "x.npz", data))))


def npy(folder, data):
    _use(open_batches(str(_written(folder / "x.npy", data))))
    load_arrays(folder / "x.npy")


def histogram(folder, data):
    """`klquant threshold` prints a table or one line, without terminal escape sequences."""
    _command("threshold", _written(folder / "h.npz", data))


def convert(folder, data):
    """`klquant convert` detects whether a file is a calibration or a table."""
    _command("convert", _written(folder / "t", data), folder / "out.json", "--to", "json")


def terminal(folder, data):
    rows = [[line] * 3 for line in data.decode("utf-8", "surrogateescape").split("\0")]
    with contextlib.redirect_stdout(OUTPUT):
        print_table(rows[0][0], ("tensor", "node", "why"), rows)
    _check_output(OUTPUT.getvalue())
    OUTPUT.seek(0)
    OUTPUT.truncate()


def diagnosis(folder, data):
    check_diagnosis(_read_json(_written(folder / "d.json", data)), seeds.NAMES)


def safetensors(folder, data):
    from klquant.demo.digits import load_network

    load_network(_written(folder / "n.safetensors", data))


def picture(folder, data):
    pixels = load_image(_written(folder / "x.png", data), ImageOptions((4, 6)))
    assert pixels.shape == (3, 4, 6)
    assert np.isfinite(pixels).all()


def onnx_model(folder, data):
    """Whatever can be prepared can be quantized, for each engine."""
    from klquant.backends.onnx import prepare, quantize
    from klquant.backends.onnx.model.observed import observed_tensors

    prepared = prepare(_written(folder / "m.onnx", data))
    scales = dict.fromkeys(observed_tensors(prepared.graph), 1.0)
    for engine in ("tensorrt", "onnxruntime", "openvino") if scales else ():
        quantize(prepared, scales, engine=engine)


def inspected(folder, data, *, engine):
    from klquant.backends.onnx import inspect

    inspect(_written(folder / "m.onnx", data), engine)


def targets():
    """Return all targets by name."""
    from .protobuf import mutate_model

    models = {"seeds": seeds.models, "bombs": seeds.model_bombs, "mutate": mutate_model, "seconds": 60.0, "mib": 3072}
    suffixes = {kind: form.suffix for kind, form in FORMATS.items()}
    return {
        "calibration": Target(calibration, seeds.calibrations, seeds.zip_bombs),
        "checkpoint": Target(checkpoint, seeds.checkpoints, seeds.zip_bombs),
        "report": Target(report, seeds.calibrations),
        "tensorrt-cache": Target(tensorrt_cache, lambda _: seeds.CACHES),
        **{
            f"table {kind}": Target(partial(table, kind=kind, suffix=suffix), partial(_tables_of, kind))
            for kind, suffix in suffixes.items()
        },
        "table": Target(table, seeds.tables),
        "npz": Target(npz, lambda _: seeds.arrays(), seeds.zip_bombs),
        "npy": Target(npy, lambda _: [seeds.npy(np.ones((5, 3), np.float32)), *seeds.arrays_of_nothing()], seeds.bombs),
        "threshold": Target(histogram, lambda _: seeds.arrays(), seeds.zip_bombs),
        "convert": Target(convert, lambda folder: [*seeds.calibrations(folder), *seeds.tables(folder)]),
        "terminal": Target(terminal, lambda _: ["\0".join(seeds.NAMES).encode()]),
        "diagnosis": Target(diagnosis, lambda _: [seeds.DIAGNOSIS], lambda: [b"[" * 100_000]),
        "safetensors": Target(safetensors, _networks, mutate=_header_first),
        "picture": Target(picture, _pictures),
        "onnx": Target(onnx_model, **models),
        "inspect tensorrt": Target(partial(inspected, engine="tensorrt"), **models),
        "inspect onnxruntime": Target(partial(inspected, engine="onnxruntime"), **models),
    }


def _tables_of(kind, folder):
    return seeds.tables(folder, kind)


def _written(path, data):
    path.write_bytes(data)
    return path


def _use(batches):
    assert len(batches) > 0
    for batch in (batches[0], batches[len(batches) - 1]):
        for array in batch.values() if isinstance(batch, dict) else [batch]:
            assert array.size
            assert array.nbytes


def _command(*arguments):
    """Run a command as a user does. Errors must be one line, with exit code 2."""
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exit_code not in (0, 2) or not isinstance(result.exception, SystemExit | None):
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    _check_output(result.output)
    if result.exit_code == 2:
        raise KLQuantError(result.output)


def _check_output(text):
    assert all(letter.isprintable() for letter in text.replace("\n", "")), ascii(text)


class _Elements(HTMLParser):
    """Collects the elements of a page and the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        self.found |= {(tag, name) for name, _ in [*attributes, ("", "")]}


def _known_elements(folder, cache={}):  # noqa: B006
    """Return the elements of the pages for the seeds."""
    if not cache:
        for data in seeds.calibrations(folder):
            page = _Elements()
            page.feed(
                render_html(describe(Calibration.load(_written(folder / "c.npz", data)), next_steps=["copy this"]))
            )
            cache.update(dict.fromkeys(page.found))
    return cache.keys()


def _networks(folder):
    from klquant.demo.digits import WEIGHTS

    shutil.copy(WEIGHTS, folder / "seed")
    return [(folder / "seed").read_bytes()]


def _header_first(data, random, others):
    """Damage a file, mostly where it says where its numbers are."""
    end = 8 + int.from_bytes(data[:8], "little") if random.random() < 0.9 else 16
    return data[:8] + mutate(data[8:end], random) + data[end:] if end > 16 else mutate(data, random)


def _pictures(_):
    from PIL import Image

    for mode, form in (("RGB", "png"), ("P", "png"), ("L", "jpeg"), ("RGB", "gif"), ("RGB", "eps")):
        buffer = io.BytesIO()
        Image.new(mode, (5, 4), 77).save(buffer, format=form)
        yield buffer.getvalue()
