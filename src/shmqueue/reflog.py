"""The log of handles that ``debug_ref_to_file_log=True`` keeps, one JSON file per queue.

``<temp>/shmqueue/_ref_log_<quoted name>.json`` has an entry per handle, by the handle's uuid:

    {"created": ISO time, "shutdown": ISO time or null, "ref_count": int, "pid": int}

``ref_count`` is the number of references after the last of the two; a handle whose process was
killed keeps ``"shutdown": null``. Several processes may write at once: each holds a lock on a file
beside it, and replaces the log by a rename, so that a reader always sees a whole one. It is an aid
for debugging, so what goes wrong here is logged and never reaches the queue.
"""

from __future__ import annotations

import enum
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["DebugRefLogAction", "record"]

MAX_ENTRIES = 1000
LOCK_TIMEOUT_S = 2.0

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class DebugRefLogAction(enum.Enum):
    """What has happened to a handle."""

    CREATE = "create"
    SHUTDOWN = "shutdown"


def record(
    queue_name_quoted: str,
    handle_uuid: str,
    action: DebugRefLogAction,
    ref_count: int,
    *,
    logger: logging.Logger | None = None,
) -> None:
    """Note in the queue's log that a handle was made or shut down; a failure is only logged."""
    name = f"_ref_log_{queue_name_quoted}.json"
    try:
        with _own_directory() as directory, _locked(f"{name}.lock", directory):
            entries = _read(name, directory)
            entry = entries.setdefault(handle_uuid, {"created": None, "shutdown": None, "ref_count": 0, "pid": 0})
            moment = "created" if action is DebugRefLogAction.CREATE else "shutdown"
            entry.update({moment: _now(), "ref_count": ref_count, "pid": os.getpid()})
            _drop_oldest(entries)
            _replace(name, entries, directory)
    except OSError as error:
        logger = logger or logging.getLogger("shmqueue")
        logger.warning("reference log %s not written: %s", name, error)


@contextmanager
def _own_directory() -> Iterator[int]:
    """Open ``<temp>/shmqueue``, made if need be; refuse one in which others could lay links."""
    import tempfile  # here and below: the log is rare, `import shmqueue` is not

    path = os.path.join(tempfile.gettempdir(), "shmqueue")
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    try:
        status = os.fstat(directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(
                f"{path} belongs to uid {status.st_uid} with mode {status.st_mode & 0o777:o}; it "
                f"must be of uid {os.geteuid()} and writable by no other (set TMPDIR to move it)"
            )
        yield directory
    finally:
        os.close(directory)


@contextmanager
def _locked(name: str, directory: int) -> Iterator[None]:
    """Hold the log's lock. The wait has an end, as its holder may be a stopped process."""
    import fcntl

    file = os.open(name, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600, dir_fd=directory)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} was locked for {LOCK_TIMEOUT_S} s") from None
                time.sleep(0.005)
        try:
            yield
        finally:  # not by closing alone: a child forked meanwhile has the file open too
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _read(name: str, directory: int) -> dict[str, dict[str, Any]]:
    """Return the log's entries; of a file that is no log, none."""
    import json

    try:
        with open(os.open(name, os.O_RDONLY | _FLAGS, dir_fd=directory), "rb") as file:
            entries = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}


def _drop_oldest(entries: dict[str, dict[str, Any]]) -> None:
    """Keep ``MAX_ENTRIES``: the oldest go, those shut down before those that are not."""
    surplus = len(entries) - MAX_ENTRIES
    if surplus > 0:
        ranked = sorted(
            entries,
            key=lambda it: (not entries[it].get("shutdown"), str(entries[it].get("created"))),
        )
        for key in ranked[:surplus]:
            del entries[key]


def _replace(name: str, entries: dict[str, dict[str, Any]], directory: int) -> None:
    import json

    new = f"{name}.new"  # one name is enough under the lock; a dead writer's is overwritten
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS
    with open(os.open(new, flags, 0o600, dir_fd=directory), "w", encoding="ascii") as file:
        json.dump(entries, file, indent=4)
    os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def _now() -> str:
    import datetime

    return datetime.datetime.now().astimezone().isoformat(timespec="microseconds")
