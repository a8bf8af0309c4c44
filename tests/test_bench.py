"""The command `bench`: it measures what it says, tells who failed and why, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shmqueue import bench

SHMQUEUE = [sys.executable, "-m", "shmqueue"]
SMALL = {"turns": 2, "seconds": 0.02}


def outcomes(workload: bench.Workload, **makers: Any) -> tuple[dict[str, list[bench.Outcome]], dict[str, str]]:
    return bench.compare(workload, makers, **SMALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(bench.MAKERS))
def test_each_workload_is_measured(name: str) -> None:
    workload = bench.workloads()[name]
    make = next(make for label, make in bench.candidates(workload).items() if label.startswith("shmqueue"))
    found, failures = outcomes(workload, ours=make)
    assert failures == {}
    assert len(found["ours"]) == SMALL["turns"]
    for one in found["ours"]:
        assert one.items >= 10 or workload.size
        assert one.seconds > 0
        assert one.cpu_seconds > 0
        assert len(one.round_trips) == (one.items if workload.is_ping_pong else 0)
        assert list(one.round_trips) == sorted(one.round_trips)


@pytest.mark.parametrize(
    ("producers", "consumers", "batch", "get_batch"), [(3, 2, 1, 1), (1, 4, 1, 7), (2, 3, 10, 10), (1, 1, 5, 1)]
)
def test_every_item_is_counted(producers: int, consumers: int, batch: int, get_batch: int) -> None:
    workload = bench.Workload("w", (1, 2, 3), producers, consumers, batch, get_batch)
    for make in (bench.Shm, bench.Stdlib):
        one = bench.turn(make, workload, 1000, is_checked=True)
        assert one.items % (producers * consumers * batch) == 0
        assert 500 <= one.items <= 1500


def test_multiprocessing_does_all_but_batches_too() -> None:
    found, failures = outcomes(bench.workloads()["ping-pong"], theirs=bench.Stdlib)
    assert failures == {}
    assert found["theirs"][0].percentile(0.5) <= found["theirs"][0].percentile(0.99)


class Wrong(bench.Shm):
    def open(self, number: int, is_producer: bool) -> bench.Port:
        port = super().open(number, is_producer)
        return bench.Port(lambda item: port.put([item]), port.get)


class Raising(bench.Shm):
    def open(self, number: int, is_producer: bool) -> bench.Port:
        if is_producer:
            raise OSError("no port today")
        return super().open(number, is_producer)


class Dying(bench.Shm):
    def open(self, number: int, is_producer: bool) -> bench.Port:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().open(number, is_producer)


class Forgetful(bench.Shm):
    def open(self, number: int, is_producer: bool) -> bench.Port:
        return bench.Port(lambda item: None, super().open(number, is_producer).get)


def test_who_fails_is_named_with_the_reason_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LIMIT_S", 2.0)
    makers: dict[str, Any] = {
        "wrong": Wrong, "raising": Raising, "dying": Dying, "forgetful": Forgetful, "unable": bench.Memcpy,
        "sound": bench.Shm,
    }  # fmt: skip
    workload = bench.workloads()["dict-1:1"]
    found, failures = outcomes(workload, **makers)
    assert list(found) == ["sound"]
    assert "another item arrived" in failures["wrong"]
    assert "no port today" in failures["raising"]
    assert "a worker died" in failures["dying"]
    assert "not done after 2 s" in failures["forgetful"]
    assert "frames" in failures["unable"]
    table = bench.table(workload, bench.summary(workload, found, failures))
    assert all(label in table for label in makers)
    assert "items/s" in table


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*SHMQUEUE, "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_the_command_prints_a_table() -> None:
    done = run("dict-1:1", "ping-pong", "--turns", "1", "--seconds", "0.02", "--against", "multiprocessing.Queue")
    assert (done.returncode, done.stderr) == (0, "")
    assert "multiprocessing.Queue" in done.stdout
    assert "us p99" in done.stdout
    assert "pyzmq" not in done.stdout


def test_the_command_prints_json() -> None:
    done = run("bytes-1:1", "ping-pong", "--turns", "2", "--seconds", "0.02", "--against", "none", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)["workloads"]
    assert {name: workload["size"] for name, workload in found.items()} == {"bytes-1:1": 0, "ping-pong": 0}
    for fields, workload in zip(
        (["cpu_us", "rate"], ["cpu_us", "p50_us", "p90_us", "p99_us", "p99.9_us"]), found.values(), strict=True
    ):
        assert list(workload["queues"]) == ["shmqueue"]
        assert list(workload["queues"]["shmqueue"]) == fields
        assert all(len(turns) == 2 and min(turns) > 0 for turns in workload["queues"]["shmqueue"].values())


def test_what_is_not_installed_is_left_out_or_an_error() -> None:
    code = (
        "import sys; from shmqueue import bench, cli; bench.FasterFifo.module = 'no_such_module'\n"
        "bench.PEERS[:] = ['faster-fifo']\n"
        "sys.exit(cli.main(['bench', 'dict-1:1', '--turns', '1', '--seconds', '0.02', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, "--against", "faster-fifo"], capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install faster-fifo" in done.stderr) == (2, True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0
    assert "faster-fifo" in done.stderr
    assert "faster-fifo" not in done.stdout


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    command = [*SHMQUEUE, "bench", "dict-1:1", "dict-alone", "--seconds", "0.02", "--turns", "1", "--against", "none"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--turns", "0"],
        ["--seconds", "nan"],
        ["--against", "rabbits"],
        ["--bad"],
        ["--against", "pyzmq", "--against", "none"],
    ],
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_leaves_nothing(number: int, code: int) -> None:
    command = [*SHMQUEUE, "bench", "dict-1:1", "--seconds", "5", "--against", "none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not list(Path("/dev/shm").glob(f"shmqueue.bench-{process.pid}-*"))
