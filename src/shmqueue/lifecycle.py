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
from functools import partial
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

# By id, since a copy of a dict's values is made in one step; a WeakSet may change under who copies it.
_handles: dict[int, weakref.ref[ShmQueue[Any]]] = {}
_on_signal: dict[int, weakref.ref[ShmQueue[Any]]] = {}
_inherited: set[int] = set()


def register(queue: ShmQueue[Any]) -> None:
    _handles[id(queue)] = weakref.ref(queue)


def unregister(queue: ShmQueue[Any]) -> None:
    _handles.pop(id(queue), None)
    _on_signal.pop(id(queue), None)
    _inherited.discard(id(queue))


def _leave(handles: dict[int, weakref.ref[ShmQueue[Any]]]) -> None:
    for reference in list(handles.values()):
        queue = reference()
        if queue is not None:
            queue._leave(now=True)


# ---- forks


def _start_child() -> None:
    _inherited.update(_handles)
    _tracked.clear()
    _leave_at_exit()


def first_ref_in_child(queue: ShmQueue[Any]) -> bool:
    """Is this handle inherited, and does nobody know of its attachment in this child yet?"""
    is_first = id(queue) in _inherited
    _inherited.discard(id(queue))
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
    _leave(_handles)


def _leave_at_exit(_: object = None) -> None:
    # After multiprocessing has joined this process's children (priorities from 0 on, then the join).
    util.Finalize(None, _leave_all, exitpriority=-100)


_leave_at_exit()
# A child of multiprocessing forgets its parent's finalizers after the hooks of os.fork have run.
util.register_after_fork(_leave_at_exit, _leave_at_exit)
# The handles' part is in C: a signal handler that raised in the middle of it would leave a slot locked for ever.
os.register_at_fork(after_in_child=_start_child)
os.register_at_fork(
    before=partial(_core.before_fork, _handles),
    after_in_parent=_core.after_fork_in_parent,
    after_in_child=_core.after_fork_in_child,
)


# ---- signals

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Handler:
    """Shuts the queues down, then does what would have been done without it. Each remembers what was
    there before it, so that a program's own handlers may stand between two of them."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _leave(_on_signal)
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def handle_signals(queue: ShmQueue[Any]) -> None:
    """Shut ``queue`` down when one of ``_SIGNALS`` comes, then pass it on."""
    if threading.current_thread() is not threading.main_thread():
        raise ShmQueueRuntimeError(f"queue {queue.identifier!r}: set_console_handlers() works in the main thread only")
    _on_signal[id(queue)] = weakref.ref(queue)
    for number in _SIGNALS:
        current = signal.getsignal(number)
        # An ignored signal stays ignored (nohup); None is a handler that C code has installed.
        if current not in (signal.SIG_IGN, None) and not isinstance(current, _Handler):
            signal.signal(number, _Handler(current))


# ---- the resource tracker


_tracked: Counter[str] = Counter()  # this process's handles


def track(path: str) -> None:
    if _tracked[path] == 0:
        resource_tracker.register(_tracked_name(path), "shared_memory")
    _tracked[path] += 1


def untrack(path: str) -> None:
    """After the detach. A process and its children have one tracker, which counts nothing: so the name is unregistered
    by whose detach removed the segment. A forked child's inherited handle was registered by its parent."""
    if _tracked[path] > 0:
        _tracked[path] -= 1
        if not os.path.lexists(path):
            resource_tracker.unregister(_tracked_name(path), "shared_memory")


def _tracked_name(path: str) -> str:
    return "/" + os.path.basename(path)  # what the tracker gives to shm_unlink
