"""Handles in processes as users have them: fork, spawn, forkserver, pools, subprocesses, exec, odd ends.

A forked child has an attachment of its own, and however it ends, the parent keeps the queue.
"""

from __future__ import annotations

import ctypes
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmqueue import ShmQueue, ShmQueueNotInitializedError

METHODS = ["fork", "spawn", "forkserver"]


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.002)


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A child by os.fork that runs ``work`` and then os._exit."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        reap(pid)


def reap(pid: int) -> int | None:
    """End a child if it still runs; its exit code, or None if it was reaped before."""
    try:
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ChildProcessError, ProcessLookupError):
        return None


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def segment_exists(name: str) -> bool:
    return os.path.exists(f"/dev/shm/shmqueue.{name}")


def test_a_closed_handle_is_not_passed_on_and_not_entered(queue_name: str) -> None:
    q = ShmQueue[Any](queue_name)
    q.shutdown()
    with pytest.raises(ShmQueueNotInitializedError):
        pickle.dumps(q)
    with pytest.raises(ShmQueueNotInitializedError), q:
        pass
    assert not segment_exists(queue_name)


# ---- multiprocessing


def echo(requests: ShmQueue[Any], answers: ShmQueue[Any]) -> None:
    for item in requests:
        if item is None:
            return
        answers.put((os.getpid(), item))


@pytest.mark.parametrize("method", METHODS)
def test_a_handle_passed_to_a_process_works_there(queue_name: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ShmQueue[Any](queue_name) as requests, ShmQueue[Any](queue_name + ".a") as answers:
        child = context.Process(target=echo, args=(requests, answers))
        child.start()
        for i in range(100):
            requests.put(i)
            assert answers.get(timeout=30) == [child.pid, i]
        requests.put(None)
        child.join(30)
        assert child.exitcode == 0
        assert (requests.refs, answers.refs) == (1, 1)
        assert segment_exists(queue_name)


def twice(name: str, x: int) -> int:
    q = ShmQueue[int](name)
    q.put(x)
    return 2 * x


@pytest.mark.parametrize("method", METHODS)
def test_a_process_pool_uses_a_queue_by_name(queue_name: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    with ShmQueue[int](queue_name) as q:
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            results = list(pool.map(twice, [queue_name] * 20, range(20)))
        assert results == [2 * x for x in range(20)]
        assert sorted(q.get_many()) == list(range(20))
        assert q.refs == 1


def put_through(q: ShmQueue[int], x: int) -> None:
    q.put(x)


def test_a_handle_is_pickled_into_a_pool(queue_name: str) -> None:
    context = multiprocessing.get_context("spawn")
    with ShmQueue[int](queue_name, buffer_size=9000) as q:
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            list(pool.map(put_through, [q] * 10, range(10)))
        assert sorted(q.get_many()) == list(range(10))


@pytest.mark.parametrize("method", METHODS)
def test_no_child_writes_a_word_to_stderr(queue_name: str, method: str, tmp_path: Any) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, sys, shmqueue\n"
        "def work(name):\n"
        "    q = shmqueue.ShmQueue(name)\n"
        "    q.put(1)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context(sys.argv[1])\n"
        "    q = shmqueue.ShmQueue(sys.argv[2])\n"
        "    ps = [context.Process(target=work, args=(sys.argv[2],)) for _ in range(3)]\n"
        "    [p.start() for p in ps]; [p.join() for p in ps]\n"
        "    assert q.get_many() == [1, 1, 1]\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), method, queue_name],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not segment_exists(queue_name)


# ---- os.fork


def test_a_forked_child_has_an_attachment_of_its_own(queue_name: str) -> None:
    with ShmQueue[str](queue_name) as q, ShmQueue[str](queue_name + ".go") as go:
        with forked(lambda: (q.put("from the child"), go.get(timeout=30))) as pid:
            assert q.get(timeout=30) == "from the child"
            assert (q.refs, go.refs) == (2, 2)
            go.put("go")
            assert exit_code(pid) == 0
        assert (q.refs, go.refs) == (1, 1)


def test_the_childs_attachment_is_there_before_it_does_anything(queue_name: str) -> None:
    q = ShmQueue[int](queue_name)
    with forked(lambda: time.sleep(60)):
        assert q.refs == 2
        q.put(7)
        q.shutdown()  # the parent leaves first; the child holds the queue
        with ShmQueue[int](queue_name) as again:
            assert again.get_nowait() == 7
    # the child was killed: it could not clean up after itself, the next one does
    ShmQueue[int](queue_name).shutdown()
    assert not segment_exists(queue_name)


def test_the_queue_outlives_a_parent_that_leaves_right_after_the_fork(queue_name: str) -> None:
    def child() -> None:
        wait_until(lambda: q.refs == 1)
        assert q.get(timeout=30) == "still here"

    q = ShmQueue[str](queue_name)
    q.put("still here")
    with forked(child) as pid:
        q.shutdown()
        assert exit_code(pid) == 0
    assert segment_exists(queue_name)  # os._exit runs nothing
    ShmQueue[str](queue_name).shutdown()


@pytest.mark.parametrize("end", ["os._exit", "sys.exit", "SIGKILL", "shutdown", "gc"])
def test_no_end_of_a_child_takes_the_queue_from_its_parent(queue_name: str, end: str) -> None:
    with ShmQueue[int](queue_name) as q:
        q.put(1)
        pid = os.fork()
        if pid == 0:
            code = "q.shutdown()" if end == "shutdown" else "del q" if end == "gc" else "pass"
            scope: dict[str, Any] = {"q": q}
            exec(code, scope)
            if end == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        exit_code(pid)
        assert q.refs == 1
        assert segment_exists(queue_name)
        assert q.get_nowait() == 1


def test_a_child_that_shuts_down_and_lives_on_holds_nothing(queue_name: str) -> None:
    with ShmQueue[int](queue_name) as q, forked(lambda: (q.shutdown(), time.sleep(60))):
        wait_until(lambda: q.refs == 1)
        q.shutdown()
        assert not segment_exists(queue_name)


def test_a_child_forked_by_a_child_works_too(queue_name: str) -> None:
    with ShmQueue[int](queue_name) as q:

        def child() -> None:
            with forked(lambda: q.put(2)) as grandchild:
                assert exit_code(grandchild) == 0
            q.put(1)

        with forked(child) as pid:
            assert exit_code(pid) == 0
        assert q.get_many() == [2, 1]
        assert q.refs == 1


SHUT_DOWN_IN_A_FORK = """
import gc, os, sys, threading
go, done, is_armed = threading.Event(), threading.Event(), []
def wait():
    if is_armed:
        go.set()
        done.wait(20)
os.register_at_fork(before=wait)  # runs after those that were registered later
from shmqueue import ShmQueue
q = ShmQueue(sys.argv[1])
path = "/dev/shm/shmqueue." + sys.argv[1]
def shut_down():
    go.wait(20)
    q.shutdown()
    done.set()
thread = threading.Thread(target=shut_down)
thread.start()
is_armed.append(1)
def is_open():
    gc.collect()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return any(path in os.readlink(link) for link in links if os.path.islink(link))
pid = os.fork()
if pid == 0:
    os._exit(is_open())
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(is_open()), int(os.path.exists(path)))
"""


def test_a_shutdown_between_the_steps_of_a_fork_leaves_nothing(queue_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SHUT_DOWN_IN_A_FORK, queue_name],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0 0 0\n", "")  # but for CPython 3.12's warning of forking with threads


def test_a_fork_beside_busy_threads_leaves_both_sides_working(queue_name: str) -> None:
    with ShmQueue[int](queue_name, buffer_size=1 << 16) as q:
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                q.put(0)
                q.get()

        threads = [threading.Thread(target=churn) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                with forked(lambda: (q.put(0, timeout=20), q.get(timeout=20))) as pid:
                    assert exit_code(pid) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)
        assert q.check() == []
        assert q.refs == 1
        assert q.qsize() == 0


def test_a_raw_clone_never_acts_as_its_parent(queue_name: str) -> None:
    """No hook runs in a child of a bare clone(2); its first call must notice."""
    libc = ctypes.CDLL(None, use_errno=True)
    sys_clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    with ShmQueue[int](queue_name) as q:
        pid = libc.syscall(sys_clone, signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            status = 1
            try:
                q.put(5, timeout=20)
                status = 0 if q.refs == 2 else 2
            finally:
                os._exit(status)
        assert exit_code(pid) == 0
        assert q.get(timeout=5) == 5
        assert q.refs == 1


def test_the_first_manual_reference_of_a_child_is_its_attachment(queue_name: str) -> None:
    with ShmQueue[int](queue_name) as q:

        def child() -> None:
            q.add_ref_manually(os.getpid())
            q.put(q.refs)
            q.add_ref_manually(os.getpid())
            q.put(q.refs)

        with forked(child) as pid:
            assert exit_code(pid) == 0
        assert q.get_many() == [2, 3]
        assert q.refs == 1  # what the child had added went with it


# ---- exec, subprocesses, exit


def test_exec_ends_the_attachment(queue_name: str) -> None:
    with ShmQueue[int](queue_name) as q, forked(lambda: os.execv("/bin/sleep", ["sleep", "60"])) as pid:
        wait_until(lambda: Path(f"/proc/{pid}/comm").read_text().strip() == "sleep")
        wait_until(lambda: q.refs == 1)


def test_a_subprocess_of_a_killed_process_does_not_keep_it_alive(queue_name: str) -> None:
    code = (
        "import subprocess, sys, time, shmqueue\n"
        f"q = shmqueue.ShmQueue({queue_name!r})\n"
        "p = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "q.put(p.pid); time.sleep(60)\n"
    )
    with ShmQueue[int](queue_name) as q:
        child = subprocess.Popen([sys.executable, "-c", code])
        sleeper = q.get(timeout=30)
        try:
            assert q.refs == 2
            child.kill()
            child.wait()
            wait_until(lambda: q.refs == 1)
        finally:
            os.kill(sleeper, signal.SIGKILL)


@pytest.mark.parametrize(
    "code",
    [
        "q = shmqueue.ShmQueue(name)",
        "q = shmqueue.ShmQueue(name); q.me = q",
        "q = shmqueue.ShmQueue(name); import sys; sys.exit(0)",
        "q = shmqueue.ShmQueue(name); import threading;"
        "threading.Thread(target=q.get, daemon=True).start(); import time; time.sleep(0.2)",
        "q = shmqueue.ShmQueue(name); import threading;"
        "threading.Thread(target=lambda: [q.put(bytes(9)) or q.get() for _ in iter(int, 1)],"
        "daemon=True).start(); import time; time.sleep(0.2)",
        "import atexit; q = shmqueue.ShmQueue(name); atexit.register(lambda: q.put(1))",
        "shmqueue.ShmQueue(name).put(1)",
    ],
)
def test_a_normal_exit_leaves_nothing(queue_name: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import shmqueue; name = {queue_name!r}; {code}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not segment_exists(queue_name)


def test_garbage_collection_detaches_at_once(queue_name: str) -> None:
    first, second = ShmQueue[int](queue_name), ShmQueue[int](queue_name)
    assert first.refs == 2
    del second
    assert first.refs == 1
    del first
    assert not segment_exists(queue_name)


def test_a_queue_whose_holders_were_all_killed_is_adopted_with_its_items(queue_name: str) -> None:
    code = f"import shmqueue, os; q = shmqueue.ShmQueue({queue_name!r}); q.put('kept'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert segment_exists(queue_name)
    with ShmQueue[str](queue_name, buffer_size=1 << 20) as q:
        assert q.refs == 1
        assert q.get_nowait() == "kept"
        assert q.max_buffer_size() == 4096  # never resized under its items


def test_an_empty_leftover_is_replaced_by_one_of_the_wanted_size(queue_name: str) -> None:
    code = f"import shmqueue, os; q = shmqueue.ShmQueue({queue_name!r}); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    with ShmQueue[str](queue_name, buffer_size=1 << 20) as q:
        assert q.max_buffer_size() == 1 << 20


def test_a_process_that_closed_all_its_files_is_never_robbed(queue_name: str) -> None:
    """Daemons close every descriptor; the attachment must not hang on one."""
    code = (
        "import os, shmqueue\n"
        f"q = shmqueue.ShmQueue({queue_name!r}); a = shmqueue.ShmQueue({queue_name + '.a'!r})\n"
        "os.closerange(3, 256)\n"
        "a.put('ready')\n"
        "for item in q:\n"
        "    a.put(item)\n"
        "    if item is None: break\n"
        "assert q.refs == 2, q.refs\n"
    )
    with ShmQueue[Any](queue_name) as q, ShmQueue[Any](queue_name + ".a") as answers:
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            assert answers.get(timeout=30) == "ready"
            for i in range(500):
                q.put(i)
                assert q.refs == 2
                assert answers.get(timeout=30) == i
            q.put(None)
            assert child.wait(30) == 0
        finally:
            child.kill()
            child.wait()


# ---- logging


def test_logging_handlers_work_on_it_unchanged(queue_name: str) -> None:
    seen: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    with ShmQueue[Any](queue_name, buffer_size=1 << 16) as q:
        listener = logging.handlers.QueueListener(q, Keep())  # type: ignore[arg-type]
        logger = logging.Logger("test")
        logger.addHandler(logging.handlers.QueueHandler(q))  # type: ignore[arg-type]
        listener.start()
        for i in range(50):
            logger.warning("number %d", i)
        listener.stop()
    assert [record.getMessage() for record in seen] == [f"number {i}" for i in range(50)]


def test_a_fork_inside_a_deserializer_leaves_the_batch_to_the_parent(queue_name: str) -> None:
    method = 2000
    with ShmQueue[Any](queue_name) as q:
        pids: list[int] = []

        def fork_once(_: int, chunks: list[memoryview]) -> Any:
            if not pids:
                pids.append(os.fork())
            return chunks[0].tobytes()

        q.custom_serialize(lambda _, data: data)
        q.custom_deserialize(fork_once)
        q.put_many([b"a", b"b", b"c"], serialization_method=method)
        got = q.get_many(3)  # one batch; without a number it begins with a batch of one
        if pids == [0]:  # the child: whatever it got, it must not end the parent's batch, and can go on
            os._exit(0 if got[0] == b"a" and q.refs == 2 else 1)
        assert got == [b"a", b"b", b"c"]
        assert exit_code(pids[0]) == 0
        assert (q.refs, q.buffer_occupancy(), q.check()) == (1, 0, [])
        q.put(1)
        assert q.get_nowait() == 1
