"""From a float ONNX model to one in INT8 by commands alone, on a network of two convolutions."""

import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from klquant.backends.calibration import Calibration
from klquant.backends.formats import write_table
from klquant.cli import cli
from klquant.cli.options import parse_overrides
from support.onnx_models import build
from support.onnx_models import run as run_model

pytestmark = pytest.mark.filterwarnings("ignore:layer `.*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[{batch}, 3, 8, 8] images) => (float[{batch}, 5] logits)
<float[4, 3, 3, 3] w1, float[5, 4, 3, 3] w2, float[4] b1, float[5] b2>
{{
    a = Conv <pads = [1, 1, 1, 1]> (images, w1, b1)
    r = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)
    p = GlobalAveragePool (c)
    logits = Flatten (p)
}}
"""


def network(batch="N"):
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NETWORK.format(batch=batch))
    shapes = {"w1": (4, 3, 3, 3), "w2": (5, 4, 3, 3), "b1": (4,), "b2": (5,)}
    weights = [
        onnx.numpy_helper.from_array(rng.normal(scale=0.3, size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return model


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def run_json(*arguments, code=0):
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout, parse_constant=pytest.fail)


def infer(path, images):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=(50, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def here(tmp_path_factory, images):
    """A folder with model.onnx, images.npz, and the calibration made from them."""
    folder = tmp_path_factory.mktemp("cli")
    onnx.save(network(), folder / "model.onnx")
    np.savez(folder / "images.npz", images=images)
    result = run("calibrate", folder / "model.onnx", "--data", folder / "images.npz", "--out", folder / "calib.npz")
    assert result.exit_code == 0, result.stderr
    (folder / "calibrate.txt").write_text(result.stdout)
    return folder


@pytest.mark.parametrize("number", [0, 1000])
def test_calibrate_finds_the_same_whatever_it_keeps(here, tmp_path, number):
    files = here / "model.onnx", "--data", here / "images.npz", "--out", tmp_path / "c.npz"
    assert run("calibrate", *files, "--keep-bytes", number).exit_code == 0
    assert (tmp_path / "c.npz").read_bytes() == (here / "calib.npz").read_bytes()


def test_calibrate_writes_histograms_and_shows_each_tensor(here, images):
    calibration = Calibration.load(here / "calib.npz")
    assert calibration.amax["images"] == np.abs(images).max()
    assert calibration.histograms["images"].hist.sum() == images.size
    assert calibration.num_batches == 2
    table = (here / "calibrate.txt").read_text()
    for name, found in calibration.thresholds.items():
        (row,) = (line for line in table.splitlines() if line.split()[:1] == [name])
        assert found.how in row
        assert row.replace(found.how, found.criterion).split()[3] == f"{found.threshold:.4g}"
    assert {"images", "r"} <= set(calibration.thresholds)


@pytest.mark.parametrize(
    ("variables", "is_styled", "is_coloured"),
    [({}, False, False), ({"FORCE_COLOR": "1"}, True, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False)],
)
def test_colours_are_for_terminals_and_for_those_who_want_them(
    here, tmp_path, monkeypatch, variables, is_styled, is_coloured
):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    result = run("calibrate", here / "model.onnx", "--data", here / "images.npz", "--out", tmp_path / "c.npz")
    assert ("\x1b[" in result.stdout) == is_styled
    assert ("\x1b[" in result.stderr) == is_styled  # the bars
    assert bool(re.search(r"\x1b\[[\d;]*3\d", result.stderr)) == is_coloured


@pytest.mark.parametrize("form", ["folder", "samples", "npy", "function"])
def test_results_do_not_depend_on_the_form_of_the_data(here, images, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mydata", raising=False)
    arguments, data = [], tmp_path / "data"
    data.mkdir()
    if form == "folder":
        for k in range(0, 50, 8):
            np.savez(data / f"{k:02}.npz", images=images[k : k + 8])
    elif form == "samples":
        for k, image in enumerate(images):
            np.save(data / f"{k:02}.npy", image)
        arguments = ["--batch-size", 7]
    elif form == "npy":
        data = tmp_path / "data.npy"
        np.save(data, images)
    else:
        np.save(tmp_path / "data.npy", images)
        text = "import numpy\ndef batches():\n    return ({'images': image[None]} for image in numpy.load('data.npy'))"
        (tmp_path / "mydata.py").write_text(text)
        monkeypatch.delitem(sys.modules, "mydata", raising=False)
        data = "mydata:batches"
    found = run_json("calibrate", here / "model.onnx", "--data", data, "--out", tmp_path / "c.npz", *arguments)
    first, second = (Calibration.load(folder / f) for folder, f in ((here, "calib.npz"), (tmp_path, "c.npz")))
    assert first.amax == second.amax
    assert repr(first.thresholds) == repr(second.thresholds)
    assert [record["threshold"] for record in found["tensors"]] == [t.threshold for t in second.thresholds.values()]


def test_a_fixed_batch_size_is_kept_to(images, tmp_path):
    onnx.save(network(batch="5"), tmp_path / "model.onnx")
    np.savez(tmp_path / "images.npz", images=images)
    found = run_json("calibrate", tmp_path / "model.onnx", "--data", tmp_path / "images.npz", "-o", tmp_path / "c.npz")
    assert found["batches"] == 10


def test_settings_reach_the_calibration(here, tmp_path):
    options = ["--num-bins", 501, "--criterion", "mse", "--override", "im*=max", "--exclude", "c"]
    options += ["--dead-channel", "1e9"]
    arguments = ["--data", here / "images.npz", "--out", tmp_path / "c.npz", *options]
    assert run("calibrate", here / "model.onnx", *arguments).exit_code == 0
    calibration = Calibration.load(tmp_path / "c.npz")
    assert len(calibration.histograms["images"].hist) == 501
    assert calibration.thresholds["images"].criterion == "max"
    assert calibration.thresholds["r"].criterion == "mse"
    assert calibration.settings.dead_channel == 1e9
    assert not any(map(any, calibration.weight_scales.values()))
    assert "c" not in calibration.thresholds


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime", "openvino"])
def test_the_quantized_model_computes_nearly_the_same_in_int8(here, images, tmp_path, engine):
    out = tmp_path / "int8.onnx"
    result = run("quantize", here / "model.onnx", here / "calib.npz", "--engine", engine, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\nimages " in result.stdout
    assert f"wrote {out}" in result.stdout
    expected = infer(here / "model.onnx", images)
    error = infer(out, images) - expected
    assert 0 < np.abs(error).max() < 0.05 * np.abs(expected).max()
    inspected = run("inspect", out, "--engine", engine)
    assert inspected.exit_code == 0, inspected.stdout
    assert "2 of 2 Conv" in inspected.stdout
    nodes = run_json("inspect", out, "--engine", engine)["nodes"]
    assert sum(node["int8"] for node in nodes if node["op_type"] == "Conv") == 2


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime", "openvino"])
def test_a_float_model_is_not_int8_and_says_so_by_its_exit_code(here, engine):
    assert run("inspect", here / "model.onnx", "--engine", engine).exit_code == 1
    found = run_json("inspect", here / "model.onnx", "--engine", engine, code=1)
    assert (found["weighted"], found["weighted_int8"]) == (2, 0)


def test_excluded_nodes_stay_in_float_and_are_listed(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx", "--exclude", "r"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert "excluded" in result.stdout.partition("left in floating point")[2]
    assert len(run_json(*arguments)["skipped"]) == 1
    assert run("inspect", tmp_path / "int8.onnx", "--engine", "tensorrt").exit_code == 1


def test_another_criterion_is_searched_in_the_histograms(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    options = ["--criterion", "max", "--override", "r=mse"]
    found = {record["tensor"]: record for record in run_json(*arguments, *options)["tensors"]}
    calibration = Calibration.load(here / "calib.npz")
    assert found["images"]["threshold"] == calibration.amax["images"]
    assert found["r"]["threshold"] == calibration.search_thresholds(criterion="mse")["r"].threshold


def test_the_guard_is_shown_and_undone(here, tmp_path):
    guarded = Calibration.load(here / "calib.npz")
    changed = {name for name, found in guarded.thresholds.items() if found.replaced}
    assert changed
    literal = guarded.search_thresholds(guard=False)
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    for options, expected in (([], guarded.thresholds), (["--no-guard"], literal)):
        for record in run_json(*arguments, *options)["tensors"]:
            found = expected[record["tensor"]]
            assert (record["threshold"], record["replaced"]) == (found.threshold, found.replaced)
    table = run(*arguments).stdout
    assert any(guarded.thresholds[name].how in table for name in changed)
    data = ["--data", here / "images.npz", "--out", tmp_path / "c.npz"]
    assert run("calibrate", here / "model.onnx", *data, "--no-guard").exit_code == 0
    calibration = Calibration.load(tmp_path / "c.npz")
    assert calibration.settings.guard is False
    assert repr(calibration.thresholds) == repr(literal)


def test_tensors_that_share_a_scale_show_the_one_that_is_written(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    options = ["--engine", "onnxruntime", "--override", "p=entropy", "--override", "logits=max"]
    found = {record["tensor"]: record for record in run_json(*arguments, *options)["tensors"]}
    assert found["p"]["threshold"] == found["logits"]["threshold"]
    assert {found["p"]["criterion"], found["logits"]["criterion"]} == {"fitted", "max"}
    assert found["p"]["sqnr_db"] is None


def test_ranges_are_shown_and_can_be_kept_symmetric(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    arguments += ["--engine", "onnxruntime", "--criterion", "max"]
    assert re.search(r"SQNR dB +low +high\n", run(*arguments).stdout)
    found, plain = (
        {record["tensor"]: record for record in run_json(*arguments, *options)["tensors"]}
        for options in ([], ["--symmetric"])
    )
    for name, one in plain.items():
        assert one["low"] == (0 if name == "r" else pytest.approx(-one["threshold"] * 128 / 127))
        assert one["high"] == pytest.approx(one["threshold"])
    low, high = Calibration.load(here / "calib.npz").ranges["c"]  # p and logits lie within and share the grid
    assert found["c"]["high"] - found["c"]["low"] == pytest.approx(high - low)
    assert found["c"]["low"] == pytest.approx(low, abs=(high - low) / 255)
    assert {name for name in plain if plain[name]["low"] != found[name]["low"]} == {"c", "p", "logits"}


def test_a_cache_becomes_the_model_that_its_thresholds_make(here, images, tmp_path):
    assert run("convert", here / "calib.npz", tmp_path / "m.cache", "--to", "tensorrt").exit_code == 0
    out = tmp_path / "int8.onnx"
    result = run("cache-to-qdq", here / "model.onnx", tmp_path / "m.cache", "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    run("quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "direct.onnx")
    np.testing.assert_allclose(infer(out, images), infer(tmp_path / "direct.onnx", images), rtol=1e-5, atol=1e-6)


def test_names_without_counterpart_are_counted(here, tmp_path):
    write_table(tmp_path / "t.csv", {"images": 3.0, "gone": 1.0, "a": 2.0, "gone too": 1.0})
    arguments = ["cache-to-qdq", here / "model.onnx", tmp_path / "t.csv", "-o", tmp_path / "int8.onnx"]
    result = run(*arguments)
    assert result.exit_code == 1  # a tensor has no scale
    assert run(*arguments, "--allow-missing").exit_code == 0
    assert f"2 of 4 names in {tmp_path / 't.csv'} are not in the model: gone, gone too" in result.stdout
    assert "1 of 2 tensors to quantize have no scale: r\n" in result.stdout
    found = run_json(*arguments, code=1)
    assert found["thresholds"] == {"images": 3.0}
    assert found["not_in_model"] == ["gone", "gone too"]
    assert found["without_scale"] == ["r"]


def test_the_engine_says_which_scales_are_needed(here, tmp_path):
    write_table(tmp_path / "t.csv", {"images": 3.0, "r": 2.0})
    arguments = ["cache-to-qdq", here / "model.onnx", "--engine", "onnxruntime", "-o", tmp_path / "int8.onnx"]
    found = run_json(*arguments, tmp_path / "t.csv", "--allow-missing")
    assert found["thresholds"] == {"images": 3.0, "r": 2.0}
    assert "c" in found["without_scale"]
    (tmp_path / "int8.onnx").unlink()
    write_table(tmp_path / "t.csv", {"images": 3.0})
    result = run(*arguments, tmp_path / "t.csv")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no threshold is known for its output `r`" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "int8.onnx").exists()


def test_a_cache_of_another_model_is_refused(here, tmp_path):
    write_table(tmp_path / "t.csv", {"x": 3.0, "y": 1.0})
    result = run("cache-to-qdq", here / "model.onnx", tmp_path / "t.csv", "-o", tmp_path / "int8.onnx")
    assert result.exit_code == 2
    assert "got none of 2: x, y; the model has images, r" in result.stderr
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "bad.onnx", "--data", "images.npz", "--out", "new.npz"],
        ["calibrate", "model.onnx", "--data", "nowhere", "--out", "new.npz"],
        ["calibrate", "model.onnx", "--data", "images.npz", "--out", "new.npz", "--num-bins", "4000"],
        ["calibrate", "model.onnx", "--data", "images.npz", "--out", "new.npz", "--include", "no*"],
        ["calibrate", "model.onnx", "--data", "other.npz", "--out", "new.npz"],
        ["calibrate", "model.onnx", "--data", "nan.npz", "--out", "new.npz"],
        ["quantize", "bad.onnx", "calib.npz", "-o", "new.onnx"],
        ["quantize", "model.onnx", "images.npz", "-o", "new.onnx"],
        ["quantize", "model.onnx", "calib.npz", "-o", "new.onnx", "--exclude", "no*"],
        ["quantize", "model.onnx", "calib.npz", "-o", "new.onnx", "--override", "no*=max"],
        ["inspect", "bad.onnx", "--engine", "tensorrt"],
        ["inspect", "bad.onnx", "--engine", "onnxruntime"],
        ["inspect", "bad.onnx", "--engine", "openvino"],
    ],
    ids=lambda arguments: " ".join(arguments[:2] + arguments[-2:]),
)
def test_wrong_input_is_one_line_and_exit_code_2(here, monkeypatch, images, arguments):
    monkeypatch.chdir(here)
    (here / "bad.onnx").write_bytes(b"no model at all")
    np.savez(here / "other.npz", pictures=images)
    np.savez(here / "nan.npz", images=np.where(images > 2, np.nan, images))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *hint = result.stderr.splitlines()
    assert first.startswith("Error: ")
    assert [line[:6] for line in hint] in ([], ["Hint: "])
    assert not (here / "new.npz").exists()
    assert not (here / "new.onnx").exists()


def test_of_overrides_the_last_one_wins():
    pairs = parse_overrides(None, None, ["a=b=max", "*=mse", "a=b=percentile"])
    assert list(pairs.items()) == [("*", {"criterion": "mse"}), ("a=b", {"criterion": "percentile"})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--override", "r"], "expected PATTERN=CRITERION"),
        (["--override", "r=kl"], "expected PATTERN=CRITERION"),
        (["--image-size", "axb"], "expected HEIGHTxWIDTH"),
        (["--image-size", "0x5"], "expected HEIGHTxWIDTH"),
        (["--mean", "1,2"], "expected one number or three"),
        (["--std", "one"], "expected one number or three"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(here, tmp_path, options, message):
    result = run("calibrate", here / "model.onnx", "--data", here, "--out", tmp_path / "c.npz", *options)
    assert (result.exit_code, message in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("engine", "verdict"),
    [
        ("onnxruntime", r"onnxruntime: \d+ of \d+ tensors match the model"),
        ("tensorrt", "TensorRT was not run; its rules hold, and onnxruntime runs the model as it is written"),
    ],
)
def test_quantize_verifies_on_data(here, tmp_path, engine, verdict):
    command = ["quantize", here / "model.onnx", here / "calib.npz", "--engine", engine, "-o", tmp_path / "q.onnx"]
    result = run(*command, "--verify", here / "images.npz")
    assert result.exit_code == 0, result.stderr
    assert re.search(f"^verified: {verdict}$", result.stdout, re.MULTILINE)
    assert re.search(verdict, run_json(*command, "--verify", here / "images.npz")["verified"])
    assert run_json(*command)["verified"] is None


def test_quantize_corrects_biases_with_data(here, tmp_path):
    command = [
        "quantize",
        here / "model.onnx",
        here / "calib.npz",
        "--engine",
        "onnxruntime",
        "-o",
        tmp_path / "q.onnx",
    ]
    data = ["--data", here / "images.npz"]
    result = run(*command, *data, "--correct-bias")
    assert re.search(r"^biases corrected: [1-9]\d* layers$", result.stdout, re.MULTILINE)
    assert run_json(*command, *data, "--correct-bias")["corrections"]
    assert run_json(*command, *data, "--no-correct-bias")["corrections"] == {}
    assert run(*command, "--correct-bias").exit_code == 2


def test_quantize_leaves_out_layers_within_the_share_that_stays_in_int8(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"w{k}" for k in range(6)]
    weights = {name: rng.normal(size=(6, 6, 3, 3), scale=0.2).astype(np.float32) for name in names}
    weights["w2"][0] *= 200  # a channel far above the others, which the next layer scales down again
    weights["w3"][:, 0] /= 200
    body = " ".join(f"{f't{k + 1}' if k < 5 else 'y'} = Conv({f't{k}' if k else 'x'}, w{k})" for k in range(6))
    onnx.save(build("float[n, 6, 20, 20] x", "float y", body, **weights), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(32, 6, 20, 20)).astype(np.float32))
    files = tmp_path / "model.onnx", tmp_path / "calib.npz"
    run("calibrate", files[0], "--data", tmp_path / "data.npz", "--out", files[1], "--criterion", "max")
    command = ["quantize", *files, "--engine", "openvino", "-o", tmp_path / "q.onnx", "--data", tmp_path / "data.npz"]
    assert run_json(*command)["skipped"] == {"conv3": "in INT8 it costs more accuracy than other layers"}
    assert run_json(*command, "--min-int8", "0.99")["skipped"] == {}
    assert run(*command, "--min-int8", "1.5").exit_code == 2


def test_quantize_names_how_many_activations_were_smoothed(tmp_path):
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=16)).astype(np.float32)
    weight = (rng.normal(size=(16, 16)) / scale[:, None]).astype(np.float32)
    body = "n = LayerNormalization(x, g, e) y = MatMul(n, w)"
    onnx.save(build("float[n, 16] x", "float y", body, g=scale, e=(16,), w=weight), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 16)).astype(np.float32))
    files = tmp_path / "model.onnx", tmp_path / "calib.npz"
    run("calibrate", files[0], "--data", tmp_path / "data.npz", "--out", files[1])
    command = ["quantize", *files, "--engine", "onnxruntime", "-o", tmp_path / "q.onnx"]
    assert run_json(*command)["smoothed"] == []
    assert "channels scaled: 1 activation\n" in run(*command, "--data", tmp_path / "data.npz").stdout


def test_smooth_writes_a_float_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32) * np.geomspace(0.1, 10, 8, dtype=np.float32)
    ones, low, high = np.ones(8, np.float32), np.zeros(8, np.float32), np.geomspace(0.1, 30, 8, dtype=np.float32)
    body = "n = LayerNormalization(x, g, b) y = MatMul(n, w)"
    onnx.save(build("float[n, 8] x", "float y", body, g=ones * high, b=low, w=(8, 4)), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=x)
    command = ["smooth", tmp_path / "model.onnx", "--data", tmp_path / "data.npz", "-o", tmp_path / "s.onnx"]
    result = run(*command, "--alpha", "0.5")
    assert (result.exit_code, result.stdout.splitlines()[-2]) == (0, f"wrote {tmp_path / 's.onnx'}")
    assert result.stdout.splitlines()[-1].startswith(f"next: klquant calibrate {tmp_path / 's.onnx'} --data ")
    found = run_json(*command, "--alpha", "0.5", "--equalize")
    assert found["changed"] > 0
    assert found["added"] == 0
    outputs = [run_model(onnx.load(tmp_path / name), x=x)["y"] for name in ("s.onnx", "model.onnx")]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)


def test_quantize_writes_nothing_if_the_engine_computes_something_else(here, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.backends.onnx.tensor_checks.LEVELS", -1)
    command = [
        "quantize",
        here / "model.onnx",
        here / "calib.npz",
        "--engine",
        "onnxruntime",
        "-o",
        tmp_path / "q.onnx",
    ]
    result = CliRunner().invoke(cli, [str(word) for word in (*command, "--verify", here / "images.npz")])
    assert result.exit_code == 2
    assert "the engine must compute what the quantized model says, got: onnxruntime" in result.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_inspect_runs_the_model_on_data(here, tmp_path, monkeypatch):
    run("quantize", here / "model.onnx", here / "calib.npz", "--engine", "onnxruntime", "-o", tmp_path / "q.onnx")
    command = ["inspect", tmp_path / "q.onnx", "--engine", "onnxruntime", "--data", here / "images.npz"]
    result = run(*command)
    assert result.exit_code == 0
    assert "tensors match the model" in result.stdout
    monkeypatch.setattr("klquant.backends.onnx.tensor_checks.LEVELS", -1)
    assert run(*command).exit_code == 1
    assert len(run_json(*command, code=1)["verified"]["wrong"]) > 0


def test_an_override_may_be_a_threshold(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    found = {record["tensor"]: record for record in run_json(*arguments, "--override", "r=1.25")["tensors"]}
    assert (found["r"]["threshold"], found["r"]["criterion"]) == (1.25, "fixed")


def test_commands_end_with_the_next_one(here, tmp_path):
    arguments = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "int8.onnx"]
    assert (
        run(*arguments).stdout.splitlines()[-1] == f"next: klquant inspect {tmp_path / 'int8.onnx'} --engine tensorrt"
    )
    last = run(*arguments, "--engine", "onnxruntime").stdout.splitlines()[-1]
    assert last.startswith(f"next: klquant compare {here / 'model.onnx'} {tmp_path / 'int8.onnx'} --data DATA")


def test_options_for_tensorrt(here, tmp_path):
    command = ["quantize", here / "model.onnx", here / "calib.npz", "-o", tmp_path / "q.onnx"]
    found = run_json(*command, "--float16", "--skip-slow")
    assert len(found["skipped"]) == 2
    assert onnx.load(tmp_path / "q.onnx").opset_import[0].version >= 19
    assert not run_json(*command)["skipped"]
    result = run(*command, "--float16", "--engine", "openvino")
    assert result.exit_code == 2
    assert "`--float16` needs engine=" in result.stderr
