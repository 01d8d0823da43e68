"""A command in a process of its own, begun anew where it dies: an illegal address takes the device
from a process for good, and a kernel that waits for what never comes ends only with its process.

The command keeps a record (`pallas_kernels.record`), by which it is known to go on.
"""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels import record

POLL_S = 0.5


def run(command: Sequence[str], file: Path, patience: float, budget: float) -> int:
    """Runs the command, with the seconds that are left behind it, until its record is finished.

    It is killed where it writes nothing for `patience` seconds, and not begun again where it wrote
    nothing new: it would do the same again. Returns the last one's exit status.
    """
    end = time.monotonic() + budget
    while True:
        before = _content(file)
        left = max(0.0, end - time.monotonic())
        code = _ended([*command, str(left)], file, patience)
        if _content(file) == before or record.read(file).get(record.FINISHED):
            return code


def _ended(command: Sequence[str], file: Path, patience: float) -> int:
    """Exit status of a command that ended, or was killed since it wrote nothing."""
    child = subprocess.Popen(command)
    try:
        last, since = _content(file), time.monotonic()
        while child.poll() is None and time.monotonic() - since <= patience:
            time.sleep(POLL_S)
            if (now := _content(file)) != last:
                last, since = now, time.monotonic()
    finally:
        child.kill()  # nothing where it has ended
        child.wait()
    return child.returncode


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""
