"""What was collected survives: kill -9, errors in the middle, another process; and never counts for other data."""

import signal

import numpy as np
import pytest
import torch

from klquant.backends.collection import Bins, Observation, Statistics, empty
from klquant.backends.collection.checkpoint import Checkpoint, Progress, skip
from klquant.backends.npz import load_npz, save_npz
from klquant.backends.torch import Calibration, Quantizer, Settings, quantize
from klquant.backends.torch.observation.observer import TorchObserver
from klquant.errors import InvalidInputError
from support.networks import Broken, Counting, mlp
from support.resume_job import NUM_BATCHES, batches, calibrate, job, network
from tools.faults.jobs import start

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")


def assert_same(got, expected):
    assert got.thresholds == expected.thresholds
    assert (got.amax, got.calls, got.num_batches) == (expected.amax, expected.calls, expected.num_batches)
    for name in expected.histograms:
        assert got.histograms[name].hist.tolist() == expected.histograms[name].hist.tolist()


def test_a_calibration_that_is_killed_again_and_again_ends_as_if_undisturbed(tmp_path):
    expected, checkpoint, result = calibrate(None), tmp_path / "progress.npz", tmp_path / "result.npz"
    deaths = 0
    for die_after in (6, 9, 0):  # folding takes a few runs: in the first pass, in the second, not at all
        process, _ = start(job, checkpoint, result, die_after)
        process.join(120)
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths == 2
    assert result.exists()
    assert_same(Calibration.load(result), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.npz", "result.npz"]


class Flaky:
    """Data whose source fails once, instead of giving its n-th batch."""

    def __init__(self, fail_at):
        self.left = fail_at

    def __iter__(self):
        for item in batches():
            self.left -= 1
            if self.left == 0:
                raise Broken
            yield item


def collect(data, forward, **options):
    quantizer = Quantizer(network(), forward=forward, num_bins=801, checkpoint_seconds=1e9, keep_bytes=0, **options)
    quantizer.fold(batches()[0])
    quantizer.quantize_weights()
    if options["passes"] == 2:
        quantizer.collect_amax(data)
    quantizer.collect_histograms(data)
    quantizer.search_thresholds()
    return quantizer.calibration


@pytest.mark.parametrize(("passes", "fail_at"), [(1, 1), (1, 5), (2, 1), (2, 4), (2, 8), (2, 12)])
def test_after_an_error_no_batch_is_run_twice(tmp_path, passes, fail_at):
    data, folding, runs = Flaky(fail_at), Counting(), Counting()
    with pytest.raises(Broken):
        collect(data, runs, resume=tmp_path / "p.npz", passes=passes)
    got = collect(data, runs, resume=tmp_path / "p.npz", passes=passes)
    assert_same(got, calibrate(None, passes=passes))
    Quantizer(network(), forward=folding).fold(batches()[0])
    assert runs.runs == 2 * folding.runs + passes * NUM_BATCHES


def test_after_resuming_errors_name_the_batch_as_the_data_have_it(tmp_path):
    with pytest.raises(Broken):
        collect(Flaky(5), Counting(), resume=tmp_path / "p.npz", passes=2)
    data = batches()
    data[5][0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="layer `0`, batch 5: activations must be finite"):
        collect(data, Counting(), resume=tmp_path / "p.npz", passes=2)


@pytest.mark.parametrize(("keep_bytes", "runs"), [(0, 2 * NUM_BATCHES), (2**30, NUM_BATCHES)])
def test_a_finished_calibration_is_not_run_again(tmp_path, keep_bytes, runs):
    path = tmp_path / "p.npz"
    first, folding, again = Counting(), Counting(), Counting()
    expected = quantize(network(), batches(), resume=path, forward=first, keep_bytes=keep_bytes).calibration
    Quantizer(network(), forward=folding).fold(batches()[0])
    assert_same(quantize(network(), batches(), resume=path, forward=again).calibration, expected)
    assert first.runs == folding.runs + runs
    assert again.runs == folding.runs


def test_a_stage_that_is_repeated_on_purpose_is_run_again(tmp_path):
    quantizer = Quantizer(network(), resume=tmp_path / "p.npz", num_bins=801)
    quantizer.fold(batches()[0])
    quantizer.quantize_weights()
    quantizer.collect_amax(batches())
    doubled = [2 * item for item in batches()]
    assert quantizer.collect_amax(doubled)["0"] == 2 * max(float(item.abs().max()) for item in batches())
    quantizer.collect_histograms(doubled)
    quantizer.search_thresholds()
    assert_same(quantizer.calibration, quantize(network(), doubled, num_bins=801).calibration)


def test_more_data_than_before_are_counted_too(tmp_path):
    for number in (3, NUM_BATCHES):
        got = quantize(network(), batches()[:number], resume=tmp_path / "p.npz", num_bins=801).calibration
        assert_same(got, quantize(network(), batches()[:number], num_bins=801).calibration)


WRONG = {
    "another order": (lambda: batches()[::-1], {}, "needs the data in the same order, got another batch 6"),
    "fewer batches": (lambda: batches()[:3], {}, "needs the 7 batches counted before, got 3"),
    "other settings": (batches, {"num_bins": 1001}, "must be a checkpoint of this model with these settings"),
    "another preparation": (batches, {"equalize": True}, "must be a checkpoint of this model with these settings"),
}


@pytest.mark.parametrize("case", WRONG)
def test_progress_on_other_data_or_settings_is_refused_and_kept(tmp_path, case):
    path = tmp_path / "p.npz"
    expected = calibrate(path)
    before = path.read_bytes()
    data, options, message = WRONG[case]
    with pytest.raises(InvalidInputError, match=message):
        quantize(network(), data(), **{"resume": path, "num_bins": 801, **options})
    assert path.read_bytes() == before
    assert_same(calibrate(path), expected)


def test_progress_of_another_model_is_refused(tmp_path):
    path = tmp_path / "p.npz"
    calibrate(path)
    other = network()
    other[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(InvalidInputError, match=r"p\.npz` must be a checkpoint of this model"):
        quantize(other, batches(), resume=path, num_bins=801)


def changed(path, *, missing=(), arrays=(), **changes):
    """Write a checkpoint again with other JSON, or without some of it or of the arrays."""
    meta, kept = load_npz(path, "checkpoint", 2)
    meta = {k: v for k, v in {**meta, **changes}.items() if k not in ("klquant", "schema", *missing)}
    save_npz(path, "checkpoint", 2, meta, {k: v for k, v in kept.items() if k not in arrays})


def with_first_pass(path, num_batches=None, **changes):
    """Change numbers of the first tensor of the first pass."""
    fields = ("name", "low", "high", "calls", "bins", "zeros", "beyond")
    passes = load_npz(path, "checkpoint", 2)[0]["passes"]
    (first, *others), number, last = passes["ranges"]
    changed_row = {**dict(zip(fields, first, strict=True)), **changes}
    ranges = [[list(changed_row.values()), *others], number if num_batches is None else num_batches, last]
    changed(path, passes={**passes, "ranges": ranges})


DAMAGE = {
    "text": lambda path: path.write_bytes(b"not a checkpoint"),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a calibration": lambda path: Calibration.of(Settings()).save(path),
    "no identity": lambda path: changed(path, missing=["identity"]),
    "no passes": lambda path: changed(path, missing=["passes"]),
    "a list of passes": lambda path: changed(path, passes=[]),
    "an empty pass": lambda path: changed(path, passes={"ranges": []}),
    "no counts": lambda path: changed(path, arrays=[k for k in load_npz(path, "checkpoint", 2)[1] if "hist_0" in k]),
    "a range upside down": lambda path: with_first_pass(path, low=1.0, high=-1.0),
    "a range in words": lambda path: with_first_pass(path, high="wide"),
    "a range without end": lambda path: with_first_pass(path, high=10**400),
    "half a call": lambda path: with_first_pass(path, calls=0.5),
    "bins without end": lambda path: with_first_pass(path, bins=[255, 10**400, None]),
    "fewer zeros than none": lambda path: with_first_pass(path, zeros=-1),
    "half a batch": lambda path: with_first_pass(path, num_batches=3.5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused_and_not_written_over(tmp_path, damage):
    path = tmp_path / "p.npz"
    calibrate(path)
    DAMAGE[damage](path)
    before = path.read_bytes()
    with pytest.raises(InvalidInputError, match=r"p\.npz` must be a klquant checkpoint file"):
        calibrate(path)
    assert path.read_bytes() == before


def test_the_file_is_written_no_more_often_than_asked(tmp_path, monkeypatch):
    checkpoint, written = Checkpoint(tmp_path / "p.npz", "me", seconds=1e9), []
    monkeypatch.setattr("klquant.backends.collection.checkpoint.save_npz", lambda *args: written.append(args))
    for number in range(5):
        checkpoint.keep("pass", Progress(Statistics({}, number), ""))
    assert not written
    checkpoint.write()
    assert len(written) == 1


def test_a_write_that_is_interrupted_is_done_all_the_same(tmp_path, monkeypatch):
    def interrupt(handle):
        if runs.runs > NUM_BATCHES:
            monkeypatch.undo()
            raise KeyboardInterrupt

    runs, again, folding = Counting(), Counting(), Counting()
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect(batches(), runs, resume=tmp_path / "p.npz", passes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]
    assert_same(collect(batches(), again, resume=tmp_path / "p.npz", passes=2), calibrate(None))
    Quantizer(network(), forward=folding).fold(batches()[0])
    assert again.runs == folding.runs + NUM_BATCHES


def test_a_place_that_cannot_be_written_to_is_an_error_before_the_first_batch(tmp_path):
    (tmp_path / "file").touch()
    forward, folding = Counting(), Counting()
    with pytest.raises(NotADirectoryError, match=r"file/p\.npz"):
        quantize(network(), batches(), resume=tmp_path / "file" / "p.npz", forward=forward)
    Quantizer(network(), forward=folding).fold(batches()[0])
    assert forward.runs == folding.runs


def test_what_a_killed_process_left_beside_the_file_goes(tmp_path):
    calibrate(tmp_path / "p.npz")
    others = [tmp_path / name for name in (".p.npz-mine.tmp", ".q.npz-12345678.tmp", "p.npz-12345678.tmp")]
    for path in (tmp_path / ".p.npz-12345678.tmp", *others):
        path.touch()
    calibrate(tmp_path / "p.npz")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "p.npz", *others])


def test_an_error_of_the_data_passes_through_with_a_note_of_the_batch(tmp_path):
    with pytest.raises(Broken) as caught:
        collect(Flaky(5), Counting(), resume=tmp_path / "p.npz", passes=2)
    assert caught.value.__notes__ == ["batch 4: the data raised this instead of yielding it"]


def test_without_a_path_nothing_is_kept():
    checkpoint = Checkpoint()
    checkpoint.keep("pass", Progress(Statistics({}, 3), "digest"))
    assert checkpoint.start("pass") == Progress(empty(), "")


def test_statistics_survive_the_file_bit_for_bit(tmp_path):
    path = tmp_path / "p.npz"
    counts = np.array([0, 2**62, 1], np.int64)
    tensors = {"a/b": Observation(-0.1, 0.1 + 0.2, 2, counts, Bins(3, 3.0**-3, -3), 5, 1), "": Observation(0.0, 0.0)}
    checkpoint = Checkpoint(path, "me")
    checkpoint.keep("pass", Progress(Statistics(tensors, 9), "digest"))
    got = Checkpoint(path, "me").start("pass")
    assert got.statistics.tensors["a/b"].counts.tolist() == counts.tolist()
    assert got.statistics.tensors["a/b"]._replace(counts=None) == tensors["a/b"]._replace(counts=None)
    assert got.statistics.tensors[""] == tensors[""]
    assert list(got.statistics.tensors) == list(tensors)
    assert (got.statistics.num_batches, got.last_batch) == (9, "digest")


ITEMS = [
    torch.ones(2),
    {"x": torch.ones(2, dtype=torch.bfloat16), "y": "text"},
    (np.ones(3), 1.5),
    [torch.tensor(True)],
]


@pytest.mark.parametrize("number", range(len(ITEMS)))
def test_batches_are_told_apart_by_all_that_they_hold(number):
    digest = TorchObserver(mlp()).digest
    assert digest(ITEMS[number]) == digest(ITEMS[number])
    assert len({digest(item) for item in ITEMS}) == len(ITEMS)
    done = Progress(Statistics({}, number + 1), digest(ITEMS[number]))
    assert list(skip(enumerate(ITEMS), done, digest)) == list(enumerate(ITEMS))[number + 1 :]


def test_a_model_without_progress_is_calibrated_as_ever():
    assert quantize(mlp(), [torch.ones(3, 4)], num_bins=301).calibration.num_batches == 1
