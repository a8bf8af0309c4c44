"""The reference log: whole at any instant, bounded, and never in the queue's way."""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shmqueue import reflog
from shmqueue.reflog import DebugRefLogAction, record

WRITER = """
import sys
from shmqueue.reflog import DebugRefLogAction, record
for i in range(int(sys.argv[2])):
    record("jobs", f"{sys.argv[1]}-{i}", DebugRefLogAction.CREATE, i)
    record("jobs", f"{sys.argv[1]}-{i}", DebugRefLogAction.SHUTDOWN, i)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def log(temporary: Path) -> Path:
    return temporary / "shmqueue" / "_ref_log_jobs.json"


def entries(log: Path) -> dict[str, dict[str, Any]]:
    return json.loads(log.read_text())


def test_actions_have_the_values_that_0_0_2_gave_them() -> None:
    assert {action.name: action.value for action in DebugRefLogAction} == {
        "CREATE": "create",
        "SHUTDOWN": "shutdown",
    }


def test_entry_tells_when_a_handle_came_and_went(log: Path) -> None:
    record("jobs", "uuid", DebugRefLogAction.CREATE, 2)
    entry = entries(log)["uuid"]
    assert (entry["shutdown"], entry["ref_count"], entry["pid"]) == (None, 2, os.getpid())
    record("jobs", "uuid", DebugRefLogAction.SHUTDOWN, 1)
    later = entries(log)["uuid"]
    assert later["created"] == entry["created"]
    assert later["ref_count"] == 1
    created, shutdown = map(datetime.datetime.fromisoformat, (later["created"], later["shutdown"]))
    assert datetime.timedelta(0) < shutdown - created < datetime.timedelta(seconds=60)


def test_log_of_one_queue_says_nothing_of_another(log: Path) -> None:
    record("jobs", "one", DebugRefLogAction.CREATE, 1)
    record("other", "two", DebugRefLogAction.CREATE, 1)
    assert list(entries(log)) == ["one"]


def test_several_processes_write_at_once_and_no_entry_is_lost(log: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(writer), "25"]) for writer in range(4)]
    while any(writer.poll() is None for writer in writers):
        if log.exists():
            entries(log)  # whole at any instant
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len(entries(log)) == 100
    assert all(entry["created"] and entry["shutdown"] for entry in entries(log).values())


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"a": 1}', "\xff", "[" * 100_000])
def test_a_file_that_is_no_log_is_replaced(log: Path, content: str) -> None:
    log.parent.mkdir(mode=0o700)
    log.write_bytes(content.encode("latin-1"))
    record("jobs", "uuid", DebugRefLogAction.CREATE, 1)
    assert list(entries(log)) == ["uuid"]


def test_entries_of_0_0_2_are_kept(log: Path) -> None:
    log.parent.mkdir(mode=0o755)
    log.write_text('{"old": {"created": "2024-01-01T00:00:00", "ref_count": 2}}')
    record("jobs", "new", DebugRefLogAction.CREATE, 1)
    record("jobs", "old", DebugRefLogAction.SHUTDOWN, 1)
    assert list(entries(log)) == ["old", "new"]
    assert entries(log)["old"]["created"] == "2024-01-01T00:00:00"


def test_log_is_bounded_and_the_oldest_closed_entries_go_first(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflog, "MAX_ENTRIES", 3)
    for uuid in "abcd":
        record("jobs", uuid, DebugRefLogAction.CREATE, 1)
        if uuid in "bc":
            record("jobs", uuid, DebugRefLogAction.SHUTDOWN, 0)
    assert list(entries(log)) == ["a", "c", "d"]
    record("jobs", "e", DebugRefLogAction.CREATE, 1)
    record("jobs", "f", DebugRefLogAction.CREATE, 1)
    assert list(entries(log)) == ["d", "e", "f"]


def refused(caplog: pytest.LogCaptureFixture, because: str) -> None:
    """Recording does no more than to warn."""
    with caplog.at_level(logging.WARNING, logger="shmqueue"):
        record("jobs", "uuid", DebugRefLogAction.CREATE, 1)
    assert because in caplog.text
    assert "_ref_log_jobs.json" in caplog.text


def test_directory_that_others_can_write_to_is_refused(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.parent.mkdir()
    log.parent.chmod(0o777)
    refused(caplog, "mode 777")
    assert not log.exists()


def test_link_in_place_of_the_directory_is_refused(
    log: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    log.parent.symlink_to(elsewhere)
    refused(caplog, str(log.parent))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.parent.mkdir(mode=0o755)
    os.chown(log.parent, 12345, 12345)
    refused(caplog, "uid 12345")
    assert not log.exists()


def test_temporary_directory_that_is_gone_is_only_warned_of(
    temporary: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    refused(caplog, "gone")


def test_lock_that_a_stopped_process_holds_ends_the_wait(
    log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflog, "LOCK_TIMEOUT_S", 0.05)
    log.parent.mkdir(mode=0o700)
    with open(f"{log}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(caplog, "was locked for 0.05 s")


def test_warning_goes_to_the_logger_given(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.parent.mkdir()
    log.parent.chmod(0o777)
    record("jobs", "u", DebugRefLogAction.CREATE, 1, logger=logging.getLogger("mine"))
    assert [entry.name for entry in caplog.records] == ["mine"]
