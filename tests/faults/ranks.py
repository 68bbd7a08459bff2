"""One of three processes that calibrate together is killed, or stops; the others must not wait for it for ever."""

import datetime
import os
import signal
import time
import warnings

from distributed_job import batches, network
from klquant.backends.torch import Quantizer, quantize
from klquant.backends.torch.running import call_model
from torch import distributed

from klquant import KLQuantError

from .jobs import folder_for, start
from .outcomes import Trials

SIZE, TIMEOUT = 3, 5  # seconds
PLACES = ("while folding", "in pass 1", "between the passes", "in pass 2")
KILLED, STOPPED = "kill -9 of one of three processes", "one of three processes stops for good"


def lose_processes(places=PLACES, ranks=range(SIZE), stopped="in pass 2"):
    """Kill each of these processes at each of these places, and let one stop."""
    with warnings.catch_warnings(), folder_for("one-process") as folder:
        warnings.simplefilter("ignore")
        quantize(network(), batches(), num_bins=801).calibration.save(folder / "result.npz")
        expected = (folder / "result.npz").read_bytes()
    checked = "the others end with a PeerError that names it, {}; resumed, the results are those of one process"
    rows = [Trials(KILLED, checked.format("at once")), Trials(STOPPED, checked.format("after the timeout"))]
    for place in places:
        for rank in ranks:
            _lose(rows[0], signal.SIGKILL, place, rank, expected, limit=TIMEOUT)
    if stopped:
        _lose(rows[1], signal.SIGSTOP, stopped, ranks[-1], expected, limit=2 * TIMEOUT)
    return [trials.row() for trials in rows]


def _lose(trials, how, place, rank, expected, limit):
    """Lose one process; see how the others end, and all of them when they go on."""
    with folder_for("processes") as folder:
        seconds, told = _run_all(folder, place, rank, how)
        trials.add(place)
        trials.expect(seconds < limit, f"{place}, process {rank}: the others end after {seconds:.0f} s")
        for other, text in told.items():
            named = text.startswith("PeerError") and f"process {rank}" in text
            trials.expect(named, f"{place}, process {rank}: process {other} ended with: {text or 'nothing'}")
        _run_all(folder)
        for other in range(SIZE):
            result = folder / f"result{other}.npz"
            fine = result.exists() and result.read_bytes() == expected
            trials.expect(fine, f"{place}, process {rank}: process {other} has another result when resumed")


def _run_all(folder, place="", lost=None, how=None):
    """Start all processes; return how long the others last after one is lost, and what they say."""
    (folder / "store").unlink(missing_ok=True)
    started = [start(_member, folder, rank, place if rank == lost else "", how)[0] for rank in range(SIZE)]
    others = [process for rank, process in enumerate(started) if rank != lost]
    if lost is not None:
        while not (folder / "lost").exists() and started[lost].is_alive():
            time.sleep(0.01)
    begin = time.monotonic()
    for process in others:
        process.join(max(10 * TIMEOUT - (time.monotonic() - begin), 0))
    seconds = time.monotonic() - begin
    for process in started:
        process.kill()
        process.join()
    texts = {rank: folder / f"{rank}.txt" for rank in range(SIZE) if rank != lost}
    return seconds, {rank: path.read_text() if path.exists() else "" for rank, path in texts.items()}


def _member(state, folder, rank, place, how):
    """Calibrate together with the others, and be lost at a place."""
    where, runs = PLACES[0], 0

    def be_lost():
        if where == place:
            (folder / "lost").touch()
            os.kill(os.getpid(), how)

    def forward(model, item):
        nonlocal runs
        runs += 1
        if where.startswith("while") or runs % 2 == 0:
            be_lost()
        return call_model(model, item)

    wait = datetime.timedelta(seconds=TIMEOUT)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=wait)
    data = batches()[2 * rank : 2 * rank + 2]
    options = {"resume": folder / "progress.npz", "checkpoint_seconds": 0.0, "num_bins": 801, "forward": forward}
    try:
        quantizer = Quantizer(network(), process_group=distributed.group.WORLD, **options)
        quantizer.fold(data[0])
        quantizer.quantize_weights()
        where, runs = PLACES[1], 0
        quantizer.collect_amax(data)
        where = PLACES[2]
        be_lost()
        where, runs = PLACES[3], 0
        quantizer.collect_histograms(data)
        quantizer.search_thresholds()
        quantizer.calibration.save(folder / f"result{rank}.npz")
    except KLQuantError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()
