"""What each test finds and what it must leave: a queue name of its own, no segment, no process.

Other test runs, and other people's queues, may be on the same machine: a segment is this run's if it
bears this run's mark in its name; a process, if it is a child or has inherited the mark in its environment.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

SHM = Path("/dev/shm")
MARK = f"test-{uuid.uuid4().hex[:8]}"
# Helpers that multiprocessing starts at need and keeps until the interpreter ends.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

# Fields of /proc/<pid>/stat, counted from the one after the command.
PARENT, START_TIME = 1, 19
OWN_START = int(Path("/proc/self/stat").read_bytes().rpartition(b") ")[2].split()[START_TIME])

os.environ["SHMQUEUE_TEST_RUN"] = MARK
_numbers = itertools.count(1)


@pytest.fixture
def queue_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that no other test uses; its segment is removed at the end."""
    words = re.sub(r"\W+", "-", request.node.name, flags=re.ASCII)
    name = f"{MARK}-{next(_numbers)}-{words[:60]}"
    yield name
    (SHM / f"shmqueue.{name}").unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves a segment or a process, and remove it, so that the next may pass."""
    segments, processes = _segments(), _processes()
    yield
    if _segments() - segments:  # handles in cycles, such as a failed test's frames
        gc.collect()
    left = [f"process {pid}: {_command(pid)}" for pid in _outlasting(processes)]
    for pid in _processes() - processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _outlasting(processes)
    for name in sorted(_segments() - segments):
        left.append(f"segment {SHM / name}")
        (SHM / name).unlink(missing_ok=True)
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


def _segments() -> set[str]:
    return {path.name for path in SHM.glob(f"shmqueue.{MARK}-*")}


def _outlasting(before: set[int], grace_s: float = 2.0) -> set[int]:
    """Processes that are new since ``before`` and don't end by themselves."""
    deadline = time.monotonic() + grace_s
    while (new := _processes() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return new


def _processes() -> set[int]:
    """Pids of this run's processes, but for zombies and multiprocessing's helpers."""
    own, mark = os.getpid(), f"SHMQUEUE_TEST_RUN={MARK}".encode()
    found = set()
    for pid in _all_pids() - {own}:
        status = _read(pid, "stat").rpartition(b") ")[2].split()
        if not status or status[0] in b"ZX" or int(status[START_TIME]) < OWN_START:
            continue
        if int(status[PARENT]) == own:
            if not any(helper in _command(pid) for helper in HELPERS):
                found.add(pid)
        elif mark in _read(pid, "environ").split(b"\0"):
            found.add(pid)
    return found


def _all_pids() -> set[int]:
    return {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _command(pid: int) -> str:
    return os.fsdecode(_read(pid, "cmdline").replace(b"\0", b" ").strip())
