"""Hostile memory, briefly: some seconds of fuzz.py, and a segment that is cut while it is attached."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shmqueue import ShmQueue
from shmqueue.exceptions import ShmQueueCorruptedError

SECONDS = 10


def test_overwritten_memory_costs_an_error_at_most() -> None:
    """`make fuzz` does more of it, under sanitizers."""
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--seconds", str(SECONDS)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100)
    print(run.stdout)  # its first line has the seed
    assert run.returncode == 0, run.stdout


def cut(name: str) -> None:
    os.truncate(f"/dev/shm/shmqueue.{name}", 0)


def test_segment_cut_while_attached_is_named_by_status_calls_and_can_be_shut_down(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        q.put("lost")
        cut(queue_name)
        for call in (q.qsize, q.empty, q.full, q.buffer_occupancy, q.snapshot, q.check, q.clear, lambda: q.refs):
            with pytest.raises(ShmQueueCorruptedError, match=r"file size is 0, expected is \d+"):
                call()
        with pytest.raises(ShmQueueCorruptedError, match="file size is 0"):
            ShmQueue(queue_name)
    assert not Path(f"/dev/shm/shmqueue.{queue_name}").exists()


def test_who_waits_in_a_segment_that_is_cut_is_told(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        cutter = threading.Timer(0.05, cut, [queue_name])
        cutter.start()
        start = time.monotonic()
        with pytest.raises(ShmQueueCorruptedError, match="file size is 0"):
            q.get(timeout=20)
        assert time.monotonic() - start < 5
        cutter.join()


def test_leases_and_forked_children_of_a_segment_that_is_cut_end_well(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        q.put("lost")
        lease = q.lease()
        cut(queue_name)
        child = os.fork()
        if child == 0:
            try:
                q.put("not even from here")
            except ShmQueueCorruptedError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    del lease
