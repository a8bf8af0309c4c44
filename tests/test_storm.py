"""``shmqueue storm``: what it promises of itself, and that its accounting can fail.

It is tried on the queue, on queues that lose, double, tear, mix up, stall and fail, and on its own sudden end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmqueue import ShmQueue, __version__, cli, storm
from shmqueue.storm import AGAIN, BATCH, TORN, Ledger, Notes, Options, Report, Shm, Storm

COMMAND = [sys.executable, "-m", "shmqueue"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100)


def segments_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"shmqueue.storm-{pid}-*"))


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.002)


# ---- the storm on the queue


@pytest.mark.parametrize("how", [[], ["--lease"], ["--deep", "1000"], ["--buffer-size", "4096", "--lease"]])
def test_a_short_storm_passes(how: list[str]) -> None:
    done = command("storm", "--kills", "100", "--stops", "20", "--json", *how)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["verdict"], report["faults"], report["left"]) == ("passed", [], [])
    assert (report["kills"], report["stops"], report["recovery"]["count"]) == (100, 20, 100)
    assert (report["doubled"], report["torn"], report["unknown"]) == (0, 0, 0)
    assert report["lost"] <= (0 if "--lease" in how else report["lost_at_most"])
    assert report["got"] == report["put"] + report["cut_off"] - report["lost"] > 0
    assert report["recovery"]["median_s"] < 0.05


def test_the_plain_report_says_how_to_repeat_it() -> None:
    done = command("storm", "--kills", "5", "--producers", "1", "--consumers", "1", "--seed", "12345")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^seed +12345$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("\nverdict          passed\n")


def test_the_same_seed_makes_the_same_decisions() -> None:
    def decisions(seed: int) -> list[str]:
        killed = []

        class Recorded(Storm):
            def _replace(self, index: int) -> None:
                killed.append(f"{index} after {self._stops} stops")
                super()._replace(index)

        options = Options(kills=15, stops=5, seed=seed)
        assert Recorded(options, Shm(options)).run().verdict == "passed"
        return killed

    assert decisions(1) == decisions(1) != decisions(2)


# ---- other queues


def test_multiprocessing_gets_a_verdict_in_time() -> None:
    start = time.monotonic()
    done = command("storm", "--against", "multiprocessing", "--kills", "200", "--timeout", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["queue"] == "multiprocessing.Queue"
    assert report["verdict"] in ("passed", "wedged", "failed", "lost", "torn", "doubled", "out of order")
    assert 0 < report["kills"] <= 200
    assert time.monotonic() - start < 60


def test_faster_fifo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "faster_fifo", None)  # whether it is installed or not
    with pytest.raises(SystemExit) as caught:
        cli.main(["storm", "--against", "faster-fifo"])
    assert caught.value.code == 2
    assert "pip install faster-fifo" in capsys.readouterr().err


# ---- queues with faults: the accounting must find them

A_FEW = {"producers": 2, "consumers": 2, "kills": 20, "stops": 2, "every_s": 0.005}
THIRD = 3  # the number of the witness's item after the third one: put in each storm, and once


def report_on(kind: type[ShmQueue[Any]], **options: Any) -> Report:
    chosen = Options(**{**A_FEW, **options})
    report = Storm(chosen, Shm(chosen, kind)).run()
    print(report)
    assert segments_of(os.getpid()) == []
    return report


class Lossy(ShmQueue[Any]):
    """Loses each 50th item of a producer."""

    puts = 0

    def put(self, data: Any, *args: Any, **options: Any) -> None:
        self.puts += 1
        if self.puts % 50:
            super().put(data, *args, **options)


class LossyOnce(ShmQueue[Any]):
    def put(self, data: Any, *args: Any, **options: Any) -> None:
        if data[0] != THIRD:
            super().put(data, *args, **options)


class DoublingOnce(ShmQueue[Any]):
    def put(self, data: Any, *args: Any, **options: Any) -> None:
        super().put(data, *args, **options)
        if data[0] == THIRD:
            super().put(data, *args, **options)


class TearingOnce(ShmQueue[Any]):
    def put(self, data: Any, *args: Any, **options: Any) -> None:
        torn = [data[0], data[1][1:] + data[1][:1]]
        super().put(torn if data[0] == THIRD else data, *args, **options)


class InventingOnce(ShmQueue[Any]):
    def put(self, data: Any, *args: Any, **options: Any) -> None:
        super().put(data, *args, **options)
        if data[0] == THIRD:
            super().put(storm.item(10**6 << 32, 1 << 18), *args, **options)


class Swapping(ShmQueue[Any]):
    """Puts each two items of a producer the wrong way round."""

    first: Any = None

    def put(self, data: Any, *args: Any, **options: Any) -> None:
        if self.first is None:
            self.first = data
        else:
            super().put(data, *args, **options)
            super().put(self.first, *args, **options)
            self.first = None


class Stalling(ShmQueue[Any]):
    """Stands still for ever at the witness's item."""

    def put(self, data: Any, *args: Any, **options: Any) -> None:
        if data[0] == THIRD:
            time.sleep(3600)
        super().put(data, *args, **options)


class Failing(ShmQueue[Any]):
    def put_many(self, *args: Any, **options: Any) -> int:
        raise ArithmeticError("on purpose")


class FailingWitness(ShmQueue[Any]):
    def put(self, data: Any, *args: Any, **options: Any) -> None:
        if data[0] == THIRD:
            raise ArithmeticError("on purpose")
        super().put(data, *args, **options)


class Crooked(ShmQueue[Any]):
    def check(self) -> list[str]:
        return ["free_pos is 1, get_pos is 0"]


class CountingTheDead(ShmQueue[Any]):
    @property
    def refs(self) -> int:
        return 7


@pytest.mark.parametrize("lease", [False, True])
def test_a_lossy_queue_is_found_out(lease: bool) -> None:
    report = report_on(Lossy, lease=lease)
    assert report.verdict == "lost"
    assert report.lost is not None
    assert report.lost > report.lost_at_most


@pytest.mark.parametrize(
    ("kind", "verdict", "figure"),
    [
        (LossyOnce, "lost", "lost"),
        (DoublingOnce, "doubled", "doubled"),
        (TearingOnce, "lost", "torn"),
        (InventingOnce, "unknown", "unknown"),
    ],
)
def test_with_leases_a_single_item_is_found_out(kind: type[ShmQueue[Any]], verdict: str, figure: str) -> None:
    report = report_on(kind, lease=True)
    assert report.verdict == verdict
    assert getattr(report, figure) == 1
    assert not report.is_passed


@pytest.mark.parametrize(
    ("kind", "verdict"), [(DoublingOnce, "doubled"), (TearingOnce, "torn"), (InventingOnce, "unknown")]
)
def test_without_leases_a_single_item_is_found_out_unless_it_is_lost(kind: type[ShmQueue[Any]], verdict: str) -> None:
    assert report_on(kind).verdict == verdict


def test_wrong_order_is_found_out() -> None:
    report = report_on(Swapping, producers=1, consumers=1)
    assert report.late > report.lost_at_most
    assert any("late" in fault for fault in report.faults)


def test_a_stall_ends_the_storm() -> None:
    start = time.monotonic()
    report = report_on(Stalling, timeout_s=0.5)
    assert (report.verdict, report.kills, report.lost) == ("wedged", THIRD + 1, None)
    assert str(report).endswith("wedged after 4 kills")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("kind", [Failing, FailingWitness])
def test_an_error_ends_the_storm_and_is_told(kind: type[ShmQueue[Any]]) -> None:
    report = report_on(kind)
    assert report.verdict == "failed"
    assert "ArithmeticError('on purpose')" in report.faults[0]


def test_a_broken_invariant_is_told() -> None:
    report = report_on(Crooked)
    assert (report.verdict, report.faults) == ("corrupted", ["free_pos is 1, get_pos is 0"])
    assert report.lost is not None  # the storm was over


def test_counting_the_dead_ends_the_storm() -> None:
    report = report_on(CountingTheDead)
    assert str(report).endswith("corrupted after 1 kills")
    assert report.faults == ["7 references, at most 5 processes use it"]


def test_what_is_left_is_told() -> None:
    class Leaving(Shm):
        def end(self) -> list[str]:
            return [*super().end(), "/dev/shm/something"]

    options = Options(**A_FEW)
    report = Storm(options, Leaving(options)).run()
    assert (report.verdict, report.left) == ("left behind", ["/dev/shm/something"])


def test_a_recovery_that_ends_too_late_is_one_too_long() -> None:
    report = report_on(ShmQueue, timeout_s=0.00001)  # shorter than the kill itself
    assert (report.verdict, report.kills) == ("wedged", 1)


# ---- the parts


def numbers(producer: int, *sequence: int) -> list[int]:
    return [producer << 32 | n for n in sequence]


def test_the_ledger_tells_lost_from_cut_off() -> None:
    ledger = Ledger()
    ledger.add_put(1, 5)
    ledger.add_got(numbers(1, 0, 2, 3, 5, 6))
    assert (ledger.put, ledger.got, ledger.cut_off, ledger.lost) == (5, 5, 2, 2)
    ledger.add_got(numbers(1, 5 + BATCH) + numbers(2, 0))
    assert (ledger.unknown, ledger.lost) == (2, 2)


def test_the_ledger_excuses_what_a_killed_holder_left_and_no_more() -> None:
    ledger = Ledger()
    ledger.add_put(1, 3)
    ledger.add_got(numbers(1, 0, 1), held=numbers(1, 1))
    ledger.add_got([AGAIN | 1 << 32 | 1])
    assert ledger.repeats() == (1, 0)
    ledger.add_got(numbers(1, 1, 2))
    ledger.add_got(numbers(1, 2))
    assert ledger.repeats() == (1, 2)


def test_the_ledger_wants_order_but_of_what_was_given_back() -> None:
    ledger = Ledger()
    ledger.add_put(1, 9)
    ledger.add_put(2, 9)
    ledger.add_got([*numbers(1, 3), *numbers(2, 0), *numbers(1, 4), AGAIN | 1 << 32 | 1, *numbers(2, 1), TORN])
    assert (ledger.late, ledger.torn, ledger.deliveries) == (0, 1, 6)
    ledger.add_got(numbers(1, 5, 2, 6))
    assert ledger.late == 1


def test_notes_outlive_who_wrote_them() -> None:
    notes = Notes(3)
    pid = os.fork()
    if pid == 0:
        notes.add(7)
        notes.add_release()
        notes.add(8)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (notes.numbers, notes.held, notes.room) == ([7, 8], [8], 1)
    notes.close()


def test_consumers_whose_notes_are_full_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notes.__init__, "__defaults__", (100,))
    report = report_on(ShmQueue, every_s=0.1, buffer_size=4096)  # all end, and the queue is full, before the next kill
    assert report.verdict == "passed"
    assert report.got > 100 * (report.killed_consumers + A_FEW["consumers"])


# ---- the command


def test_help_and_version() -> None:
    for arguments, words in (
        (["--help"], ["storm"]),
        (["--version"], [f"shmqueue {__version__}"]),
        (["storm", "--help"], ["--kills", "default: 1000", "exit code", "--against"]),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(word in done.stdout for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "arguments are required: COMMAND"),
        ("calm", "invalid choice: 'calm'"),
        ("storm --kills 0", "argument --kills: 0 is no number from 1 to 1,000,000,000,000"),
        ("storm --kills many", "argument --kills: invalid int value: 'many'"),
        ("storm --timeout nan", "argument --timeout: nan is no number"),
        ("storm --every 1e300", "argument --every: 1e300 is no number"),
        ("storm --every -1", "argument --every: -1 is no number from 0 to"),
        ("storm --producers 300 --consumers 300", "600 workers; at most 500"),
        ("storm --lease --against multiprocessing", "multiprocessing has no leases"),
        ("storm --against pigeons", "invalid choice: 'pigeons'"),
    ],
)
def test_arguments_that_cannot_do(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_no_room_is_told_in_a_line() -> None:
    done = command("storm", "--buffer-size", str(10**12))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"the storm itself failed: .*free in /dev/shm\)\n", done.stderr)


@contextmanager
def running_storm(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([*COMMAND, "storm", "--kills", "100000", *arguments], text=True, **options) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_storm_is_ended_nothing_is_left(number: signal.Signals) -> None:
    """That no process is left is conftest.py's to find."""
    with running_storm("--verbose", stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert " kills, " in child.stderr.readline()
        assert len(segments_of(child.pid)) == 1
        child.send_signal(number)
        said = child.stderr.read()  # to the end: the last worker has it open too
        assert child.wait(timeout=20) == (-number if number == signal.SIGKILL else 128 + number)
        wait_until(lambda: not segments_of(child.pid))
        assert ("interrupted after" in said) == (number == signal.SIGINT)


def test_on_a_terminal_one_line_is_rewritten() -> None:
    ours, theirs = os.openpty()
    with running_storm(stderr=theirs) as child:
        os.close(theirs)
        seen = b""
        while seen.count(b"\r") < 3:
            seen += os.read(ours, 1000)
        child.send_signal(signal.SIGINT)
        child.wait(timeout=20)
    os.close(ours)
    assert b"\n" not in seen
