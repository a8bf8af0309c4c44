"""What becomes of handles when their process forks, ends, or is told to by a signal.

A forked child gets attachments of its own for all handles of its parent, made while the parent still
holds the queue, so that it can't vanish in between. A normal exit leaves like ``shutdown()``; so do the
children of multiprocessing, which end in ``os._exit`` after running its finalizers.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections import Counter
from multiprocessing import resource_tracker, util
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import _core
from .exceptions import ShmQueueRuntimeError

if TYPE_CHECKING:
    from .queue import ShmQueue

__all__ = [
    "end_thread_if_exiting",
    "first_ref_in_child",
    "handle_signals",
    "register",
    "track",
    "unregister",
    "untrack",
]

_handles: weakref.WeakSet[ShmQueue[Any]] = weakref.WeakSet()
_on_signal: weakref.WeakSet[ShmQueue[Any]] = weakref.WeakSet()
_inherited: weakref.WeakSet[ShmQueue[Any]] = weakref.WeakSet()
_forking: list[ShmQueue[Any]] = []
_fork_lock = threading.RLock()


def register(queue: ShmQueue[Any]) -> None:
    _handles.add(queue)


def unregister(queue: ShmQueue[Any]) -> None:
    _handles.discard(queue)
    _on_signal.discard(queue)
    _inherited.discard(queue)


# ---- forks


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking[:] = [queue for queue in list(_handles) if queue._fork_before() == _core.OK]


def _after_in_parent() -> None:
    for queue in _forking:
        queue._fork_parent()
    _forking.clear()
    _fork_lock.release()


def _after_in_child() -> None:
    for queue in _forking:
        queue._fork_child()  # where it fails, the first call attaches
    _inherited.update(_forking)
    _forking.clear()
    _tracked.clear()
    _fork_lock.release()
    _leave_at_exit()


def first_ref_in_child(queue: ShmQueue[Any]) -> bool:
    """Is this handle inherited, and does nobody know of its attachment in this child yet?"""
    is_first = queue in _inherited
    _inherited.discard(queue)
    return is_first


# ---- exit


_is_exiting = False


def end_thread_if_exiting() -> None:
    """A daemon thread that outlives the exit's shutdown just ends, as it would a moment later anyway."""
    if _is_exiting and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _leave_all() -> None:
    global _is_exiting
    _is_exiting = True
    for queue in list(_handles):
        queue._leave(now=True)


def _leave_at_exit(_: object = None) -> None:
    # After multiprocessing has joined this process's children (priorities from 0 on, then the join).
    util.Finalize(None, _leave_all, exitpriority=-100)


_leave_at_exit()
# A child of multiprocessing forgets its parent's finalizers after the hooks of os.fork have run.
util.register_after_fork(_leave_at_exit, _leave_at_exit)
os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)


# ---- signals

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Handler:
    """Shuts the queues down, then does what would have been done without it. Each remembers what was
    there before it, so that a program's own handlers may stand between two of them."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for queue in list(_on_signal):
            queue._leave(now=True)
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def handle_signals(queue: ShmQueue[Any]) -> None:
    """Shut ``queue`` down when one of ``_SIGNALS`` comes, then pass it on."""
    if threading.current_thread() is not threading.main_thread():
        raise ShmQueueRuntimeError(
            f"queue {queue.identifier!r}: set_console_handlers() works in the main thread only"
        )
    _on_signal.add(queue)
    for number in _SIGNALS:
        current = signal.getsignal(number)
        # An ignored signal stays ignored (nohup); None is a handler that C code has installed.
        if current not in (signal.SIG_IGN, None) and not isinstance(current, _Handler):
            signal.signal(number, _Handler(current))


# ---- the resource tracker


_tracked: Counter[str] = Counter()  # this process's handles; the tracker itself doesn't count


def track(path: str) -> None:
    if _tracked[path] == 0:
        resource_tracker.register(_tracked_name(path), "shared_memory")
    _tracked[path] += 1


def untrack(path: str) -> None:
    """A forked child's inherited handle was registered by its parent, which will also unregister it."""
    if _tracked[path] > 0:
        _tracked[path] -= 1
        if _tracked[path] == 0:
            resource_tracker.unregister(_tracked_name(path), "shared_memory")


def _tracked_name(path: str) -> str:
    return "/" + os.path.basename(path)  # what the tracker gives to shm_unlink
