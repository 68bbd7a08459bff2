"""One of three processes that calibrate together is killed or stops. The others must not wait for it forever."""

import datetime
import os
import re
import signal
import time
import warnings

from torch import distributed

from klquant import KLQuantError
from klquant.backends.torch import Quantizer, quantize
from klquant.backends.torch.model.forward import call_model
from support.distributed_job import batches, network

from .jobs import folder_for, start
from .outcomes import Trials

SIZE, TIMEOUT = 3, 4  # seconds
PLACES = ("while folding", "in pass 1", "between the passes", "in pass 2", "in an exchange after it")
KILLED, STOPPED = "kill -9 of one of three processes", "one of three processes stops for good"


def lose_processes(places=PLACES, ranks=range(SIZE)):
    """Kill each of these processes at each of these places, and stop one at the first place."""
    with warnings.catch_warnings(), folder_for("one-process") as folder:
        warnings.simplefilter("ignore")
        quantize(network(), batches(), num_bins=801).calibration.save(folder / "result.npz")
        expected = (folder / "result.npz").read_bytes()
    checked = "the others end with a PeerError that names it, {}; resumed, the results are those of one process"
    rows = [Trials(KILLED, checked.format("at once")), Trials(STOPPED, checked.format("after the timeout"))]
    for place in places:
        for rank in ranks:
            _lose(rows[0], signal.SIGKILL, place, rank, expected, limit=TIMEOUT)
    _lose(rows[1], signal.SIGSTOP, places[0], ranks[-1], expected, limit=2 * TIMEOUT)
    return [trials.row() for trials in rows]


def _lose(trials, how, place, rank, expected, limit):
    """Lose one process. Check how the others end, and that all of them finish after a restart."""
    with folder_for("processes") as folder:
        seconds, told = _run_all(folder, place, rank, how)
        trials.add(place)
        trials.expect(seconds < limit, f"{place}, process {rank}: the others end after {seconds:.0f} s")
        for other, text in told.items():
            named = re.findall(r"process (\d)", text) if text.startswith("PeerError") else []
            fine = str(rank) in named if how == signal.SIGKILL else named == [str(rank)]  # others may have ended too
            trials.expect(fine, f"{place}, process {rank}: process {other} ended with: {text or 'nothing'}")
        _run_all(folder)
        for other in range(SIZE):
            result = folder / f"result{other}.npz"
            fine = result.exists() and result.read_bytes() == expected
            trials.expect(fine, f"{place}, process {rank}: process {other} has another result when resumed")


def _run_all(folder, place="", lost=None, how=None):
    """Start all processes. Return how long the others run after one is lost, and their errors."""
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
    """Calibrate together with the others, and end or stop at a place."""
    where, runs, all_reduce = PLACES[0], 0, distributed.all_reduce

    def be_lost():
        if where == place:
            (folder / "lost").touch()
            os.kill(os.getpid(), how)

    def enter(number):
        nonlocal where, runs
        where, runs = PLACES[number], 0

    def forward(model, item):
        nonlocal runs
        runs += 1
        if where == PLACES[0] or runs == 2:
            be_lost()
        return call_model(model, item)

    def reduce(*arguments, **options):
        if runs == 2 and where == PLACES[3]:
            enter(4)
            be_lost()
        return all_reduce(*arguments, **options)

    distributed.all_reduce = reduce
    wait, store = datetime.timedelta(seconds=TIMEOUT), f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=wait)
    distributed.barrier()  # until the others are here too
    try:
        calibration = _calibrate(folder, batches()[2 * rank : 2 * rank + 2], forward, enter, be_lost)
        calibration.save(folder / f"result{rank}.npz")
    except KLQuantError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()


def _calibrate(folder, data, forward, enter, be_lost):
    options = {"resume": folder / "progress.npz", "checkpoint_seconds": 0.0, "num_bins": 801, "forward": forward}
    quantizer = Quantizer(network(), process_group=distributed.group.WORLD, keep_bytes=0, **options)
    quantizer.fold(data[0])
    quantizer.quantize_weights()
    enter(1)
    quantizer.collect_amax(data)
    enter(2)
    be_lost()
    enter(3)
    quantizer.collect_histograms(data)
    quantizer.search_thresholds()
    return quantizer.calibration
