"""The peak resident memory of this process: VmHWM, because ru_maxrss starts at the value of the parent."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak():
    """Return the peak in KiB."""
    status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(status["VmHWM"].split()[0])
