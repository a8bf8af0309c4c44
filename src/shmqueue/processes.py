"""What commands that start processes share: workers that end with their parent, progress, arguments, the machine."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["FORK", "Progress", "machine", "number_from", "signals_blocked", "signals_exit", "when_parent_dies"]

FORK = multiprocessing.get_context("fork")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MOST = 10**12
"""Of anything that is asked for."""


def when_parent_dies(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when the one that started it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent:  # too late
        os._exit(1)


@contextmanager
def signals_exit() -> Iterator[None]:
    """Make SIGTERM and SIGHUP orderly exits, with 143 and 129, so that what was begun is ended. Unless ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back what ends a command: while a process is forked, hooks of the standard library would swallow it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def machine() -> str:
    """Processor, CPUs that this process may use, Python."""
    model = platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}"


def number_from(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """A type for argparse: numbers from ``least`` to ``MOST``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least:g} to {MOST:,}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


class Progress:
    """Shows a line on stderr: rewritten on a terminal; elsewhere, if that is wanted, a new one each second."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_wanted = is_wanted or self._is_terminal
        self._next = 0.0

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if self._is_wanted and now >= self._next:
            self._next = now + (0.1 if self._is_terminal else 1.0)
            sys.stderr.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
