"""Measures everything that docs/performance.md shows, and writes that page, its plots and its JSON. About 15 minutes.

    python benchmarks/report.py [--turns 5] [--seconds 0.5] [--out docs] [--again]

`--again` makes the page anew from the JSON that is there. The workloads and queues are those of `shmqueue bench`; what
is measured of this queue alone is further down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import resource
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import msgpack

from shmqueue import ShmQueue, ShmQueueEmpty, __version__, bench, serialization
from shmqueue.processes import FORK, Progress, machine, when_parent_dies

DICT = bench.DICT
OURS = "shmqueue"
FIFO_TABLE = ((1, 1), (1, 10), (10, 1), (3, 20), (20, 3), (20, 20))
DEPTHS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
BUFFERS = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28, 1 << 32)


def all_workloads() -> dict[str, bench.Workload]:
    """Those of the command, and faster-fifo's table."""
    found = bench.workloads()
    for producers, consumers in FIFO_TABLE:
        for way, get_batch in (("get", 1), ("get_many", 1000)):
            name = f"fifo-{producers}:{consumers}-{way}"
            found[name] = bench.Workload(name, bench.TUPLE, producers, consumers, get_batch=get_batch)
    return found


def candidates(workload: bench.Workload) -> dict[str, Any]:
    if workload.name.startswith("fifo-"):
        return bench.candidates(workload, (OURS, "faster-fifo", "multiprocessing.Queue"))
    return bench.candidates(workload)


# ---- what only this queue is asked


def in_turn(measures: dict[Any, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Call each in turn."""
    found: dict[str, list[float]] = {str(key): [] for key in measures}
    for _ in range(turns):
        for key, measure in measures.items():
            found[str(key)].append(measure())
    return found


def codec_and_queue(turns: int) -> dict[str, list[float]]:
    """Nanoseconds of one put and get, and of the codecs alone."""
    pack, option, unpack = serialization.fast_codec(False)
    count = 50_000

    def fast() -> float:
        start = time.perf_counter()
        for _ in repeat(None, count):
            unpack(pack(DICT, None, option))
        return (time.perf_counter() - start) / count * 1e9

    def usual() -> float:
        packb, unpackb = msgpack.packb, msgpack.unpackb
        start = time.perf_counter()
        for _ in repeat(None, count):
            unpackb(packb(DICT))
        return (time.perf_counter() - start) / count * 1e9

    with ShmQueue[Any](bench.new_name()) as queue:
        return in_turn(
            {"ormsgpack alone": fast, "msgpack alone": usual, "put + get": lambda: put_and_get(queue, count)}, turns
        )


def put_and_get(queue: ShmQueue[Any], count: int) -> float:
    put, get, item = queue.put, queue.get, DICT
    start = time.perf_counter()
    for _ in repeat(None, count):
        put(item)
        get()
    return (time.perf_counter() - start) / count * 1e9


def by_depth(turns: int) -> dict[str, list[float]]:
    """Nanoseconds of one put and get while so many items are queued."""
    with ExitStack() as stack:
        queues = {}
        for depth in DEPTHS:
            queues[depth] = stack.enter_context(ShmQueue[Any](bench.new_name(), buffer_size=45 * depth + 4096))
            for _ in range(depth // 100):
                queues[depth].put_many([DICT] * 100)
        return in_turn({depth: lambda q=queue: put_and_get(q, 50_000) for depth, queue in queues.items()}, turns)


def by_buffer(turns: int) -> dict[str, list[float]]:
    """Nanoseconds of one put and get in a queue of that many bytes."""
    with ExitStack() as stack:
        queues = {size: stack.enter_context(ShmQueue[Any](bench.new_name(), buffer_size=size)) for size in BUFFERS}
        return in_turn({size: lambda q=queue: put_and_get(q, 50_000) for size, queue in queues.items()}, turns)


@contextmanager
def children(works: list[Callable[[], None]]) -> Iterator[None]:
    """Processes that are killed in the end."""

    def run(work: Callable[[], None], parent: int) -> None:
        when_parent_dies(parent, signal.SIGKILL)
        work()

    processes = [FORK.Process(target=run, args=(work, os.getpid()), daemon=True) for work in works]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def fairness(producers: int, consumers: int, seconds: float = 5.0) -> dict[str, float]:
    """What the slowest did of what the fastest did, among producers and among consumers."""
    counts = memoryview(mmap.mmap(-1, 8 * (producers + consumers))).cast("Q")
    with ShmQueue[Any](bench.new_name(), buffer_size=bench.ROOM) as queue:

        def work(i: int) -> None:
            put, get, n = queue.put, queue.get, 0
            while True:
                for _ in range(100):
                    if i < producers:
                        put(DICT)
                    else:
                        get()
                n += 100
                counts[i] = n

        with children([lambda i=i: work(i) for i in range(producers + consumers)]):
            time.sleep(1.0)
            before = counts.tolist()
            time.sleep(seconds)
            done = [now - then for now, then in zip(counts.tolist(), before, strict=True)]
    put, got = done[:producers], done[producers:]
    return {"producers": min(put) / max(put), "consumers": min(got) / max(got), "rate": sum(got) / seconds}


def idle_cpu(seconds: float = 5.0) -> float:
    """CPU seconds of a get that waits for that long."""
    with ShmQueue[Any](bench.new_name()) as queue:
        start = resource.getrusage(resource.RUSAGE_SELF)
        try:
            queue.get(timeout=seconds)
        except ShmQueueEmpty:
            end = resource.getrusage(resource.RUSAGE_SELF)
            return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    raise AssertionError("an item came")


def memory_at_rest(count: int = 100) -> float:
    """Bytes that a queue with one handle costs beside its buffer: the segment's and the process's."""

    def used() -> int:
        with open("/proc/self/status", encoding="ascii") as lines:
            private = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        free = os.statvfs("/dev/shm")
        return private + (free.f_blocks - free.f_bfree) * free.f_frsize

    with ExitStack() as stack:
        stack.enter_context(ShmQueue[Any](bench.new_name()))
        before = used()
        size = 0
        for _ in range(count):
            size += stack.enter_context(ShmQueue[Any](bench.new_name())).max_buffer_size()
        return (used() - before - size) / count


# ---- measure


def measure(turns: int, seconds: float, only: list[str]) -> dict[str, Any]:
    progress = Progress(True)
    found: dict[str, Any] = {
        "version": __version__, "machine": machine(), "kernel": os.uname().release, "date": date.today().isoformat(),
        "turns": turns, "seconds": seconds, "workloads": {},
    }  # fmt: skip
    for name, workload in all_workloads().items():
        if only and name not in only:
            continue
        outcomes, failures = bench.compare(workload, candidates(workload), turns, seconds, progress)
        found["workloads"][name] = bench.summary(workload, outcomes, failures)
        print(bench.table(workload, found["workloads"][name]), flush=True)
    alone: dict[str, Callable[[], Any]] = {
        "codec": lambda: codec_and_queue(3 * turns),
        "depth": lambda: by_depth(2 * turns),
        "buffer": lambda: by_buffer(2 * turns),
        "fairness": lambda: {f"{n}:{n}": fairness(n, n) for n in (4, 20)},
        "idle": lambda: statistics.median(idle_cpu() for _ in range(turns)),
        "memory": memory_at_rest,
    }
    for name, work in alone.items():
        if not only or name in only:
            progress(name)
            found[name] = work()
            print(name, json.dumps(found[name]), flush=True)
    return found


# ---- what it says


@dataclasses.dataclass
class Results:
    """The figures by their names; medians."""

    data: dict[str, Any]

    def of(self, workload: str, label: str = OURS, field: str = "rate") -> float:
        return statistics.median(self.data["workloads"][workload]["queues"][label][field])

    def peers(self, workload: str) -> list[str]:
        labels = self.data["workloads"][workload]["queues"]
        return [label for label in labels if not label.startswith((OURS, "("))]

    def best(self, workload: str, field: str = "rate", labels: list[str] | None = None) -> tuple[float, str]:
        """The best peer's figure, and who that is."""
        among = [(self.of(workload, label, field), label) for label in labels or self.peers(workload)]
        return (max if field == "rate" else min)(among)

    def medians(self, name: str) -> dict[str, float]:
        return {key: statistics.median(values) for key, values in self.data[name].items()}


INTRODUCTION = """\
Written by `make bench` on {date}: shmqueue {version}, {machine}, Linux {kernel}; medians of {turns} turns of about
{seconds:g} s. The machine is virtual and shared, so compare figures of this page with each other, not with those of
another machine or day: here a rate may double when the host moves the two processors to where they share a cache. All
candidates take turns, with processes and a queue of their own each time, and before the timed turns each carries the
workload once with every item compared. `shmqueue bench` measures on yours."""

THROUGHPUT = """\
Items per second, the spread between the slowest and the fastest turn, and CPU time of all workers per item. Queues of
bytes only (hyperq, pyzmq, iceoryx2) get dicts packed by ormsgpack, as this queue packs them; "hyperq, msgpack" by
msgpack. Others pickle. In brackets: no queue, but memory copied by numpy to and from between two processes. In
`frame-in-place` nothing is copied or written: what remains is the cost of the calls."""

ROUND_TRIPS = """\
A small dict sent to another process and back, by two queues; each of the two is bound to a processor of its own. Busy:
as fast as they can. Paced: every 2 ms, so that who sleeps has to be woken. iceoryx2 is polled: its CPU time says what
that costs."""

WHY_MISSED = """\
Why some are missed: {share:.0f} % of a put and get of a small dict in one process is the codec, ormsgpack, which turns
dicts into bytes and back. Whoever is given the same codec shares that cost, so hyperq, which moves bytes and nothing
else, can't be outrun by much more; with msgpack, the usual codec, it is further behind. Where nothing has to be encoded
(`bytes-1:1`) the rate hangs on whether the two processors share a cache: compare the fastest turns there too."""


@dataclasses.dataclass(frozen=True)
class Goal:
    what: str
    how: str
    value: float
    """As measured."""

    wanted: float
    is_minimum: bool

    @property
    def is_met(self) -> bool:
        return self.value >= self.wanted if self.is_minimum else self.value <= self.wanted

    def __str__(self) -> str:
        sign = "≥" if self.is_minimum else "≤"
        met = "" if self.is_met else "**missed**"
        return f"| {self.what} | {self.how} | {self.value:.3g} | {sign} {self.wanted:g} | {met} |"


def goals(r: Results) -> list[Goal]:
    found: list[Goal] = []

    def at_least(what: str, how: str, value: float, goal: float) -> None:
        found.append(Goal(what, how, value, goal, True))

    def at_most(what: str, how: str, value: float, goal: float) -> None:
        found.append(Goal(what, how, value, goal, False))

    for name, what, goal in (
        ("dict-1:1", "small dict, 1:1", 2.5),
        ("bytes-1:1", "100 bytes, 1:1", 4.0),
        ("dict-4:4", "small dict, 4:4", 2.0),
        ("dict-1:1-batch", "batches of 100", 4.0),
    ):
        rate, label = r.best(name)
        at_least(what, f"times the best peer ({label})", r.of(name) / rate, goal)
    usual = [label for label in r.peers("dict-1:1") if label != "hyperq"]
    rate, label = r.best("dict-1:1", labels=usual)
    at_least(
        "small dict, 1:1", f"times the best peer with msgpack or its own codec ({label})", r.of("dict-1:1") / rate, 2.5
    )
    at_least(
        "small dict, 1:1",
        "times multiprocessing.Queue",
        r.of("dict-1:1") / r.of("dict-1:1", "multiprocessing.Queue"),
        20,
    )
    at_least("small dict, 4:4", "times our own 1:1", r.of("dict-4:4") / r.of("dict-1:1"), 0.7)
    codec = r.medians("codec")
    at_most(
        "put + get, one process", "times msgpack's packb + unpackb", codec["put + get"] / codec["msgpack alone"], 1.15
    )
    at_most(
        "put + get, one process", "times ormsgpack's, which we use", codec["put + get"] / codec["ormsgpack alone"], 1.15
    )
    p50, label = r.best("ping-pong", "p50_us")
    at_most("ping-pong, busy, p50", f"times the best peer ({label})", r.of("ping-pong", field="p50_us") / p50, 2.0)
    blocking = [label for label in r.peers("ping-pong-paced") if label != "iceoryx2"]
    p50, label = r.best("ping-pong-paced", "p50_us", blocking)
    at_most(
        "ping-pong, paced, p50",
        f"times the best peer that sleeps ({label})",
        r.of("ping-pong-paced", field="p50_us") / p50,
        1.0,
    )
    at_most("a get that waits for 5 s", "CPU seconds", r.data["idle"], 0.005)
    at_least(
        "6.2 MB frames, put + get",
        "times copying in and out",
        r.of("frame-1:1") / r.of("frame-1:1", "(copied in and out)"),
        0.9,
    )
    in_place = r.of("frame-read-1:1", "shmqueue, lease(copy=False)") / r.of("frame-read-1:1", "(copied in)")
    at_least("6.2 MB frames, put + lease(copy=False)", "times copying in and reading there", in_place, 0.9)
    small, large = (r.of(f"frame-in-place-{size}KiB", "shmqueue, reserve_array") for size in (64, 6075))
    at_most("reserve_array + lease(copy=False)", "time of 6 MB by that of 64 KB", small / large, 1.5)
    for producers, consumers in FIFO_TABLE:
        for way in ("get", "get_many"):
            name = f"fifo-{producers}:{consumers}-{way}"
            at_least(
                f"5 ints, {producers}:{consumers}, {way}",
                "times faster-fifo",
                r.of(name) / r.of(name, "faster-fifo"),
                1.0,
            )
    for name, what in (
        ("depth", "put + get, 1,000 to 10,000,000 queued"),
        ("buffer", "put + get, 4 KiB to 4 GiB buffer"),
    ):
        times = r.medians(name).values()
        at_most(what, "slowest by fastest", max(times) / min(times), 1.3)
    for size, parts in r.data["fairness"].items():
        at_least(f"fairness, {size}, producers", "slowest by fastest, over 5 s", parts["producers"], 0.3)
    at_most("a queue at rest", "KiB beside its buffer", r.data["memory"] / 1024, 200)
    return found


def page(data: dict[str, Any]) -> str:
    r = Results(data)
    lines = [
        "# Performance",
        "",
        textwrap.fill(INTRODUCTION.format(**data), 120),
        "",
        "![Throughput](performance-throughput.svg)",
        "",
        "## What we want to reach, and what was measured",
        "",
        "| what | measured | | goal | |",
        "|---|---|---:|---:|---|",
        *map(str, goals(r)),
    ]
    codec = r.medians("codec")
    share = codec["ormsgpack alone"] / codec["put + get"] * 100
    lines += ["", WHY_MISSED.format(share=share), "", *losses(r), "## Throughput", ""]
    lines += [THROUGHPUT, ""]
    for name, workload in data["workloads"].items():
        if "ping-pong" not in name and not name.startswith("fifo-"):
            lines += rates(name, workload)
    lines += ["## Round trips", "", "![Round trips](performance-latency.svg)", ""]
    lines += [ROUND_TRIPS, ""]
    for name, workload in data["workloads"].items():
        if "ping-pong" in name:
            lines += trips(name, workload)
    lines += ["## faster-fifo's table", "", "Tuples of 5 ints; items per second.", ""]
    columns = [f"{label}, {way}" for way in ("get", "get_many") for label in (OURS, "faster-fifo")]
    columns.append("multiprocessing.Queue")
    lines += ["| producers:consumers | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for producers, consumers in FIFO_TABLE:
        names = [f"fifo-{producers}:{consumers}-{way}" for way in ("get", "get_many")]
        cells = [r.of(name, label) for name in names for label in (OURS, "faster-fifo")]
        cells.append(r.of(names[0], "multiprocessing.Queue"))
        lines.append(f"| {producers}:{consumers} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")
    lines += ["", "## How cost grows", "", "![Cost](performance-growth.svg)", ""]
    for name, what in (("depth", "items queued"), ("buffer", "bytes of the buffer")):
        medians = r.medians(name)
        lines += [
            f"| {what} | " + " | ".join(f"{int(key):,}" for key in medians) + " |",
            "|---|" + "---:|" * len(medians),
        ]
        lines += ["| put + get, ns | " + " | ".join(f"{value:,.0f}" for value in medians.values()) + " |", ""]
    lines += [
        "Each of these was measured by itself, so the state of the machine may have been another one for each. "
        "One process, a small dict, in turn: "
        + ", ".join(f"{key} {value:,.0f} ns" for key, value in codec.items())
        + ".",
        "",
        "| processes | items/s | slowest producer by fastest | slowest consumer by fastest |",
        "|---|---:|---:|---:|",
    ]
    for size, parts in data["fairness"].items():
        lines.append(f"| {size} | {parts['rate']:,.0f} | {parts['producers']:.2f} | {parts['consumers']:.2f} |")
    lines += [
        "",
        f"A `get` that waits for 5 s takes {data['idle'] * 1000:.1f} ms of CPU time. A queue at rest costs "
        f"{data['memory'] / 1024:.0f} KiB beside its buffer, its first handle included.",
    ]
    return "\n".join(lines) + "\n"


def losses(r: Results) -> list[str]:
    """Where somebody is faster."""
    found = []
    for name in r.data["workloads"]:
        field = "p50_us" if "ping-pong" in name else "rate"
        if OURS not in r.data["workloads"][name]["queues"]:
            continue
        ours = r.of(name) if field == "rate" else r.of(name, field=field)
        for label in r.peers(name):
            theirs = r.of(name, label, field)
            if theirs > ours if field == "rate" else theirs < ours:
                found.append(f"- {name}: {label} by {max(theirs / ours, ours / theirs):.2f} times")
    return ["Where another queue is faster:", "", *(found or ["- nowhere here"]), ""]


def rates(name: str, workload: dict[str, Any]) -> list[str]:
    is_frame = bool(workload["size"]) and "in-place" not in name
    lines = [
        f"### {name}",
        "",
        "| | items/s | slowest to fastest |" + (" GB/s |" if is_frame else "") + " CPU, us/item |",
    ]
    lines.append("|---|---:|---:|---:|" + ("---:|" if is_frame else ""))
    for label, queue in workload["queues"].items():
        rate = statistics.median(queue["rate"])
        size = f" {rate * workload['size'] / 1e9:,.2f} |" if is_frame else ""
        spread = f"{min(queue['rate']):,.0f} to {max(queue['rate']):,.0f}"
        lines.append(f"| {label} | {rate:,.0f} | {spread} |{size} {statistics.median(queue['cpu_us']):,.2f} |")
    return [*lines, *(f"| {label} | {reason} | |" for label, reason in workload["failures"].items()), ""]


def trips(name: str, workload: dict[str, Any]) -> list[str]:
    lines = [
        f"### {name}",
        "",
        "| us | p50 | p90 | p99 | p99.9 | CPU per round trip |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, queue in workload["queues"].items():
        cells = [statistics.median(queue[f"{part}_us"]) for part in ("p50", "p90", "p99", "p99.9")]
        cells.append(statistics.median(queue["cpu_us"]))
        lines.append(f"| {label} | " + " | ".join(f"{cell:,.1f}" for cell in cells) + " |")
    return [*lines, *(f"| {label} | {reason} |" for label, reason in workload["failures"].items()), ""]


# ---- plots


def plot(data: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shmqueue", "font.size": 9})
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(out / f"performance-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    def bars(axes: Any, values: dict[str, float], title: str, unit: str, notes: dict[str, float]) -> None:
        labels = list(values)[::-1]
        colors = ["tab:blue" if label.startswith(OURS) else "tab:gray" for label in labels]
        drawn = axes.barh(labels, [values[label] for label in labels], color=colors)
        axes.bar_label(
            drawn, [f"{values[label]:,.0f}  ({notes[label]:,.4g} us CPU)" for label in labels], padding=2, fontsize=7
        )
        axes.set(title=title, xlabel=unit, xscale="log")
        axes.set_xlim(min(values.values()) / 2, max(values.values()) * 30)  # room for the figures

    def of(name: str, field: str) -> dict[str, float]:
        queues = data["workloads"][name]["queues"]
        return {label: statistics.median(queue[field]) for label, queue in queues.items()}

    names = [name for name in data["workloads"] if name.startswith(("dict-", "bytes-"))]
    names += [name for name in data["workloads"] if name.startswith("frame-") and "in-place" not in name]
    figure, grid = pyplot.subplots((len(names) + 1) // 2, 2, figsize=(11, 2.3 * ((len(names) + 1) // 2)))
    for axes, name in zip(grid.flat, names, strict=False):
        bars(axes, of(name, "rate"), name, "items/s", of(name, "cpu_us"))
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    save(figure, "throughput")

    figure, grid = pyplot.subplots(1, 2, figsize=(14, 3.5))
    parts = ("p50", "p90", "p99", "p99.9")
    for axes, name in zip(grid, ("ping-pong", "ping-pong-paced"), strict=True):
        cpu = of(name, "cpu_us")
        for label, queue in data["workloads"][name]["queues"].items():
            values = [statistics.median(queue[f"{part}_us"]) for part in parts]
            axes.plot(parts, values, marker="o", label=f"{label} ({cpu[label]:,.3g} us CPU)")
        axes.set(title=name, ylabel="us", yscale="log")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "latency")

    figure, grid = pyplot.subplots(1, 2, figsize=(11, 3))
    for axes, name, unit in zip(grid, ("depth", "buffer"), ("items queued", "bytes of the buffer"), strict=True):
        medians = Results(data).medians(name)
        axes.plot([int(key) for key in medians], list(medians.values()), marker="o")
        axes.set(xlabel=unit, ylabel="put + get, ns", xscale="log", ylim=(0, None))
    save(figure, "growth")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of each candidate; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one turn, about; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="only make the page and plots, from the JSON")
    parser.add_argument("--only", action="append", default=[], help="print this part alone; writes nothing")
    arguments = parser.parse_args()
    path = arguments.out / "performance.json"
    if arguments.again:
        data = json.loads(path.read_text())
    else:
        data = measure(arguments.turns, arguments.seconds, arguments.only)
        if arguments.only:
            return 0
        path.write_text(json.dumps(data, indent=1) + "\n")
    (arguments.out / "performance.md").write_text(page(data))
    plot(data, arguments.out)
    for goal in goals(Results(data)):
        print(goal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
