"""Count the words of Python's standard library: several processes read, several count.

Each line of each source file goes through a queue, from producers to consumers. The processes are
unrelated interpreters that are told no more than a queue's name; what to do they read from that
queue. The result is compared with a direct count, and ``multiprocessing.Queue`` does the same work
with the same code beside it. Each transport runs twice: counting words, which is most of the work,
and only passing the lines.

    python examples/word_count.py --help
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue as stdlib_queue
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shmqueue import ShmQueue

WORD = re.compile(r"\w+")
END = None  # what a consumer takes last
PATIENCE_S = 30.0


class Failure(Exception):
    """The work can't be done; the message says why."""


class Queue(Protocol):
    """What both kinds of queue can do; ShmQueue's ``put_many`` and ``get_many`` come on top."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None, /) -> None: ...
    def get(self, block: bool = True, timeout: float | None = None) -> Any: ...


# --- the input ------------------------------------------------------------------------------------


def source_files(limit: int | None = None) -> list[Path]:
    """The standard library's sources, or a sample of them that is spread evenly."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages"}
    files = sorted(
        path for path in root.rglob("*.py") if path.is_file() and foreign.isdisjoint(path.relative_to(root).parts)
    )
    if limit is None or limit >= len(files):
        return files
    return [files[i * len(files) // limit] for i in range(limit)]


def lines_of(files: list[Path]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


def count_directly(files: list[Path]) -> tuple[int, Counter[str]]:
    """The lines and words of ``files``, counted without a queue and file by file, not by line."""
    lines, words = 0, Counter[str]()
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="replace")
        lines += text.count("\n") + (not text.endswith("\n") and text != "")
        words.update(WORD.findall(text))
    return lines, words


# --- the workers: one code for both kinds of queue ------------------------------------------------


def work(order: dict[str, Any], queue: Any, reports: Queue, gate: Queue) -> None:
    """Do what ``order`` says, as a producer or as a consumer, when all are ready."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to explain
    threading.Thread(target=end_with_parent, daemon=True).start()
    is_producer = order["role"] == "produce"
    files = source_files(order["files"])[order["shard"] :: order["shards"]] if is_producer else []
    reports.put(["ready", order["shard"], 0])
    gate.get()
    if is_producer:
        produce(order, files, queue, reports)
    else:
        consume(order, queue, reports)


def end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def produce(order: dict[str, Any], files: list[Path], queue: Any, reports: Queue) -> None:
    if order["many"]:
        queue.put_many(lines_of(files))
    else:
        for line in lines_of(files):
            queue.put(line)
    if not isinstance(queue, ShmQueue):  # here put() leaves the sending to a thread
        queue.close()
        queue.join_thread()
    reports.put(["produced", order["shard"], 0])


def consume(order: dict[str, Any], queue: Any, reports: Queue) -> None:
    words = Counter[str]()
    count, due = 0, 0.0
    for line in take_many(queue) if order["many"] else take(queue):
        if order["words"]:
            words.update(WORD.findall(line))
        count += 1
        if count % 256 == 0 and (now := time.monotonic()) >= due:
            reports.put(["lines", order["shard"], count])
            due = now + 0.2
    reports.put(["lines", order["shard"], count])
    reports.put(["ended", order["shard"], time.monotonic()])
    counted = iter(words.items())
    while part := dict(itertools.islice(counted, 1000)):
        reports.put(["words", order["shard"], part])
    reports.put(["done", order["shard"], 0])


def take(queue: Queue) -> Iterator[str]:
    while (line := queue.get()) is not END:
        yield line


def take_many(queue: ShmQueue[Any]) -> Iterator[str]:
    while True:
        batch = queue.get_many(1000)
        ends = batch.count(END)  # they come last: one is ours, the others go back
        yield from batch[: len(batch) - ends]
        if ends:
            queue.put_many([END] * (ends - 1))
            return


# --- the crews: who starts the workers, and ends them whatever happens ----------------------------


@dataclass(frozen=True)
class Crew:
    queue: Queue
    reports: Queue
    gate: Queue
    size: int
    exit_codes: Callable[[], list[int | None]]


@contextmanager
def unrelated_processes(orders: list[dict[str, Any]], buffer_size: int) -> Iterator[Crew]:
    """Interpreters that find their orders, the lines and each other by the queues' names alone."""
    name = f"word_count.{os.getpid()}"
    with ExitStack() as stack:
        sizes = {".lines": buffer_size, ".reports": 1 << 20, ".gate": 1, ".orders": 1 << 16}
        lines, reports, gate, todo = (
            stack.enter_context(ShmQueue[Any](name + suffix, buffer_size=size)) for suffix, size in sizes.items()
        )
        children = []
        for order in orders:
            todo.put(order)
            children.append(subprocess.Popen([sys.executable, __file__, "--join", name]))
            stack.callback(children[-1].wait)
            stack.callback(children[-1].kill)
        yield Crew(lines, reports, gate, len(children), lambda: [child.poll() for child in children])
        for child in children:
            child.wait(PATIENCE_S)


def join(name: str) -> None:
    with ExitStack() as stack:
        lines, reports, gate, todo = (
            stack.enter_context(ShmQueue[Any](name + suffix)) for suffix in (".lines", ".reports", ".gate", ".orders")
        )
        work(todo.get(), lines, reports, gate)


@contextmanager
def related_processes(orders: list[dict[str, Any]], buffer_size: int) -> Iterator[Crew]:
    """Children of multiprocessing that are handed its queues."""
    context = multiprocessing.get_context("spawn")
    lines, reports, gate = context.Queue(), context.Queue(), context.Queue()
    with ExitStack() as stack:
        for each in (lines, reports, gate):
            stack.callback(each.close)
            stack.callback(each.cancel_join_thread)
        children = []
        for order in orders:
            child = context.Process(target=work, args=(order, lines, reports, gate))
            child.start()
            children.append(child)
            stack.callback(child.join)
            stack.callback(child.kill)
        yield Crew(lines, reports, gate, len(children), lambda: [child.exitcode for child in children])
        for child in children:
            child.join(PATIENCE_S)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transport:
    title: str
    crew: Callable[[list[dict[str, Any]], int], Any]
    many: bool


TRANSPORTS = (
    Transport("shmqueue put/get", unrelated_processes, many=False),
    Transport("shmqueue put_many/get_many", unrelated_processes, many=True),
    Transport("multiprocessing.Queue", related_processes, many=False),
)


@dataclass(frozen=True)
class Outcome:
    lines: int
    words: Counter[str]
    seconds: float  # from when all are ready to the last consumer's end


def run(transport: Transport, options: argparse.Namespace, files: int, is_counting: bool, total: int) -> Outcome:
    common = {"files": files, "many": transport.many, "words": is_counting}
    orders = [
        {"role": role, "shard": shard, "shards": shards, **common}
        for role, shards in (("consume", options.consumers), ("produce", options.producers))
        for shard in range(shards)
    ]
    task = "words" if is_counting else "lines only"
    with transport.crew(orders, options.buffer_size) as crew:
        return supervise(crew, options, Progress(f"{transport.title}, {task}", total))


def supervise(crew: Crew, options: argparse.Namespace, progress: Progress) -> Outcome:
    """Follow the reports. When all producers are through, each consumer gets its ``END``."""
    words = Counter[str]()
    lines: dict[int, int] = {}
    start, ended = 0.0, []
    unready, producing, consuming = crew.size, options.producers, options.consumers
    while consuming:
        try:
            what, shard, value = crew.reports.get(timeout=0.1)
        except stdlib_queue.Empty:
            if any(crew.exit_codes()):
                raise Failure("a worker has failed") from None
            continue
        if what == "ready":
            unready -= 1
            if not unready:
                start = progress.start()
                for _ in range(crew.size):
                    crew.gate.put("go")
        elif what == "produced":
            producing -= 1
            for _ in range(0 if producing else options.consumers):
                crew.queue.put(END, True, PATIENCE_S)
        elif what == "lines":
            lines[shard] = value
            progress.show(sum(lines.values()))
        elif what == "ended":
            ended.append(value)
        elif what == "words":
            words.update(value)
        else:
            consuming -= 1
    progress.close()
    return Outcome(sum(lines.values()), words, max(ended) - start)


class Progress:
    """A line on a terminal, redrawn; elsewhere a new line, but seldom."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._is_terminal = sys.stderr.isatty()
        self._interval_s = 0.2 if self._is_terminal else 1.0
        self.start()

    def start(self) -> float:
        self._start = self._shown = time.monotonic()
        return self._start

    def show(self, lines: int) -> None:
        now = time.monotonic()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        text = (
            f"{self._title}: {lines:,} of {self._total:,} lines ({lines / self._total:.0%}), "
            f"{lines / (now - self._start):,.0f}/s"
        )
        print(
            f"\r{text}\x1b[K" if self._is_terminal else text,
            end="" if self._is_terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# --- the whole ------------------------------------------------------------------------------------


def main() -> int:
    options = parse_arguments()
    if options.join:
        join(options.join)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        return compare(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the workers are ended, the queues removed", file=sys.stderr)
        return 128 + signal.SIGINT
    except (Failure, stdlib_queue.Full) as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return 1


def compare(options: argparse.Namespace) -> int:
    files = source_files(options.limit_files)
    sample = source_files(min(len(files), options.baseline_files))
    print(
        f"{len(files):,} files of {sysconfig.get_path('stdlib')}; {options.producers} producers, "
        f"{options.consumers} consumers, {len(os.sched_getaffinity(0))} CPUs, "
        f"Python {sys.version.split()[0]}, queue of {options.buffer_size:,} bytes"
    )
    start = time.monotonic()
    direct = {len(files): count_directly(files)}
    seconds = time.monotonic() - start
    direct.setdefault(len(sample), (0, Counter()))
    if len(sample) < len(files):
        direct[len(sample)] = count_directly(sample)
        print(f"multiprocessing.Queue gets a sample of {len(sample):,} files, evenly spread")
    lines, words = direct[len(files)]
    print(
        f"direct count, one process, no queue: {lines:,} lines, {words.total():,} words, "
        f"{len(words):,} different; {lines / seconds:,.0f} lines/s\n"
    )
    print(f"{'lines/s of the whole job':28}{'lines':>12}{'words counted':>16}{'lines only':>14}")
    is_right = True
    for transport in TRANSPORTS:
        n_files = len(sample if transport.crew is related_processes else files)
        lines, words = direct[n_files]
        counting = run(transport, options, n_files, True, lines)
        passing = run(transport, options, n_files, False, lines)
        is_verified = counting.words == words and counting.lines == passing.lines == lines
        is_right &= is_verified
        print(
            f"{transport.title:28}{lines:12,}{lines / counting.seconds:16,.0f}"
            f"{lines / passing.seconds:14,.0f}  "
            f"{'result verified' if is_verified else 'WRONG RESULT'}",
            flush=True,
        )
        if not is_verified:
            explain(counting, passing, lines, words)
    return 0 if is_right else 1


def explain(counting: Outcome, passing: Outcome, lines: int, words: Counter[str]) -> None:
    wrong = sorted(word for word in words | counting.words if words[word] != counting.words[word])
    print(
        f"  lines: {counting.lines:,} and {passing.lines:,} instead of {lines:,}; "
        f"words with another count: {len(wrong):,} {wrong[:5]}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count the words of Python's standard library through a queue, verify the "
        "result, and compare with multiprocessing.Queue.",
    )
    parser.add_argument("--producers", type=positive, default=3, metavar="N")
    parser.add_argument("--consumers", type=positive, default=2, metavar="N")
    parser.add_argument("--limit-files", type=positive, metavar="N", help="take a sample of N files (default: all)")
    parser.add_argument(
        "--baseline-files",
        type=positive,
        default=700,
        metavar="N",
        help="multiprocessing.Queue gets a sample of N files (default: %(default)s)",
    )
    parser.add_argument(
        "--buffer-size",
        type=positive,
        default=1 << 20,
        metavar="BYTES",
        help="size of the queue of lines (default: %(default)s)",
    )
    parser.add_argument("--join", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
