"""Leases: an item stays in the queue until it is released, and comes again when its holder fails or dies."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from shmqueue import (
    Lease,
    ShmQueue,
    ShmQueueDeserializationError,
    ShmQueueEmpty,
    ShmQueueFull,
    ShmQueueNotInitializedError,
    ShmQueueRuntimeError,
    ShmQueueTypeError,
    ShmQueueValueError,
)

SIZES = [0, 10, 5000, 200_000]  # a claim in place is made of any of them


@pytest.fixture
def q(queue_name: str) -> Iterator[ShmQueue[Any]]:
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as queue:
        yield queue


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked child that ends by itself; its exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- how it ends


@pytest.mark.parametrize("size", SIZES)
def test_the_end_of_the_block_releases(q: ShmQueue[Any], size: int) -> None:
    q.put(bytes(size))
    with q.lease(timeout=1) as item:
        assert item == bytes(size)
        assert (q.qsize(), q.empty()) == (0, True)
        assert q.buffer_occupancy() > size
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_an_exception_gives_back_and_passes_on(q: ShmQueue[Any], size: int) -> None:
    q.put_many([bytes(size), "newer"])
    with pytest.raises(ZeroDivisionError), q.lease():
        _ = 1 / 0
    assert q.qsize() == 2
    assert [q.get(), q.get()] == [bytes(size), "newer"]


def test_by_hand_and_only_once(q: ShmQueue[Any]) -> None:
    q.put_many("ab")
    first, second = q.lease(), q.lease()
    assert (first.item, first.deliveries, first.is_over) == ("a", 1, False)
    first.give_back()
    second.release()
    for lease in (first, second):
        assert lease.is_over
        assert lease.item in "ab"
        for use in (lease.release, lease.give_back, lease.__enter__):
            with pytest.raises(ShmQueueRuntimeError, match="lease is over"):
                use()
    assert q.get_many() == ["a"]


def test_release_within_the_block(q: ShmQueue[Any]) -> None:
    q.put("a")
    lease = q.lease()
    with lease:
        lease.release()
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


def test_a_forgotten_lease_is_given_back(q: ShmQueue[Any]) -> None:
    q.put("a")
    lease = q.lease()
    assert q.empty()
    del lease
    assert q.get_nowait() == "a"
    q.put("b")
    cycle: list[Any] = [q.lease()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert q.get_nowait() == "b"


def test_deliveries_are_counted(q: ShmQueue[Any]) -> None:
    q.put("a")
    for n in range(1, 5):
        lease = q.lease()
        assert lease.deliveries == n
        lease.give_back()
    assert q.get() == "a"


def test_it_says_what_it_is(q: ShmQueue[Any]) -> None:
    q.put({"a": 1})
    lease = q.lease()
    assert repr(lease) == f"<Lease of {q!r}: {{'a': 1}}, delivery 1>"
    lease.release()
    assert repr(lease).endswith(", over>")
    with pytest.raises(TypeError):
        Lease()
    with pytest.raises(TypeError):
        pickle.dumps(lease)
    assert Lease[int] is not None


# ---- among others


def test_leases_end_in_any_order_and_hold_nobody_up(q: ShmQueue[Any]) -> None:
    q.put_many(range(10))
    leases = [q.lease() for _ in range(8)]
    assert q.get() == 8
    for i in (3, 0, 7, 5):
        leases[i].release()
    for i in (6, 1, 4, 2):
        leases[i].give_back()
    assert q.get_many() == [1, 2, 4, 6, 9]
    assert q.buffer_occupancy() == 0


def test_one_of_a_batch_given_back_can_be_leased(q: ShmQueue[Any]) -> None:
    """get_many() gives back what follows an item that can't be decoded, as one."""
    q.custom_serialize(lambda method, data: data)
    for i in range(6):
        q.put(b"bad" if i == 2 else b"good", serialization_method=2000 if i == 2 else 0)
    assert q.get_many() == [b"good", b"good"]
    with pytest.raises(ShmQueueDeserializationError):
        q.lease()  # the error that was kept
    leases = [q.lease(), q.lease()]
    assert q.qsize() == 1
    leases[0].give_back()
    assert q.get_many() == [b"good", b"good"]


def test_a_queue_full_behind_a_lease_goes_on_when_it_ends(q: ShmQueue[Any]) -> None:
    q.put(bytes(100))
    lease = q.lease()
    while True:
        try:
            q.put(bytes(100_000), block=False)
        except ShmQueueFull:
            break
    q.clear()  # room, but behind the lease
    with pytest.raises(ShmQueueFull):
        q.put(bytes(100_000), timeout=0.05)
    timer = threading.Timer(0.1, lease.release)
    timer.start()
    q.put(bytes(100_000), timeout=10)
    timer.join()


def test_as_many_as_the_table_holds_and_then_empty(q: ShmQueue[Any]) -> None:
    q.put_many(range(1025))
    leases = [q.lease() for _ in range(1024)]
    assert [lease.item for lease in leases] == list(range(1024))
    for block in (True, False):
        with pytest.raises(ShmQueueEmpty, match="as many as possible are"):
            q.lease(block=block, timeout=0.05)
    assert q.qsize() == 1
    timer = threading.Timer(0.1, leases[7].give_back)
    timer.start()
    assert q.lease(timeout=10).item == 7  # and forgotten
    timer.join()
    assert sorted([q.get(), q.get()]) == [7, 1024]  # which needs no claim


def test_timeouts_are_those_of_get(q: ShmQueue[Any]) -> None:
    start = time.monotonic()
    with pytest.raises(ShmQueueEmpty, match=r"no item within 0.1 s"):
        q.lease(timeout=0.1)
    assert 0.1 <= time.monotonic() - start < 1.0
    with pytest.raises(ShmQueueEmpty):
        q.lease(block=False)
    with pytest.raises(ShmQueueValueError):
        q.lease(timeout=-1)
    with pytest.raises(ShmQueueTypeError):
        q.lease(timeout="1")  # type: ignore[arg-type]
    with pytest.raises(ShmQueueValueError, match="max_deliveries is 0, at least 1"):
        q.lease(max_deliveries=0)
    with pytest.raises(ShmQueueTypeError, match="max_deliveries must be an int, not str"):
        q.lease(max_deliveries="3")  # type: ignore[arg-type]


def test_a_waiting_lease_is_woken_by_a_put_and_by_giving_back(q: ShmQueue[Any]) -> None:
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(q.lease(timeout=10)))
    waiter.start()
    time.sleep(0.05)
    q.put("a")
    waiter.join()
    second = threading.Thread(target=lambda: got.append(q.lease(timeout=10)))
    second.start()
    time.sleep(0.05)
    got[0].give_back()
    second.join()
    assert (got[1].item, got[1].deliveries) == ("a", 2)


def test_threads_share_out_the_items(q: ShmQueue[Any]) -> None:
    done: list[int] = []

    def work() -> None:
        while True:
            with q.lease() as number:
                if number is None:
                    return
                done.append(number)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(3000):
        q.put(number)
    for _ in threads:
        q.put(None)
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(3000))
    assert q.buffer_occupancy() == 0


# ---- deaths, forks, exits


@pytest.mark.parametrize("size", SIZES)
def test_a_killed_holders_item_comes_again_before_newer_ones(q: ShmQueue[Any], size: int) -> None:
    for n in range(1, 4):
        if n == 1:
            q.put_many([bytes(size), "newer"])

        def hold() -> None:
            with q.lease():
                die()

        assert in_child(hold) == -signal.SIGKILL
        assert q.qsize() == 2
    with q.lease() as item:
        assert item == bytes(size)
    assert q.get() == "newer"


def test_a_killed_stranger_gives_back_all_it_held(q: ShmQueue[Any], queue_name: str) -> None:
    q.put_many(range(50))
    code = (
        "import os, shmqueue\n"
        f"q = shmqueue.ShmQueue({queue_name!r})\n"
        "leases = [q.lease() for _ in range(40)]\n"
        "leases[10].release()\n"
        "print(flush=True); os.read(0, 1)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert q.qsize() == 10
    finally:
        child.kill()
        child.communicate()
    assert sorted(q.get_many()) == [i for i in range(50) if i != 10]


def test_a_stranger_that_exits_gives_back_what_it_held(q: ShmQueue[Any], queue_name: str) -> None:
    q.put_many("ab")
    code = (
        f"import shmqueue\nq = shmqueue.ShmQueue({queue_name!r})\n"
        "lease = q.lease()\nother = q.lease()\nother.release()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (q.refs, q.get_many()) == (1, ["a"])


def test_a_forked_child_does_not_end_its_parents_leases(q: ShmQueue[Any]) -> None:
    q.put("a")
    lease = q.lease()

    def end_them() -> None:
        for use in (lease.release, lease.give_back, lease.__enter__):
            with pytest.raises(ShmQueueRuntimeError, match="forked"):
                use()
        q.put("b")  # works on an attachment of its own
        assert q.get() == "b"

    assert in_child(end_them) == 0
    assert in_child(lambda: lease.__exit__(None, None, None)) == 0  # of a block that the parent was in
    assert not lease.is_over
    assert q.buffer_occupancy() > 0
    lease.give_back()
    assert q.get_nowait() == "a"


def test_shutdown_leaves_a_lease_its_attachment(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as other:
        q = ShmQueue[Any](queue_name)
        q.put_many("abc")
        first, second, third = q.lease(), q.lease(), q.lease()
        q.shutdown()
        with pytest.raises(ShmQueueNotInitializedError):
            q.lease()
        assert other.refs == 2  # until the last one ends
        first.release()
        second.give_back()
        assert other.get_nowait() == "b"
        del third
        assert (other.get_nowait(), other.refs, other.buffer_occupancy()) == ("c", 1, 0)


def test_a_lease_keeps_its_handle(queue_name: str) -> None:
    q = ShmQueue[Any](queue_name)
    q.put("a")
    lease = q.lease()
    del q
    lease.release()
    del lease
    assert not os.path.exists(f"/dev/shm/shmqueue.{queue_name}")


def put_and_lease_for_ever(q: ShmQueue[Any]) -> None:
    while True:
        q.put("a")
        q.lease(timeout=10).release()


def test_a_signal_while_waiting_leaves_no_lease(q: ShmQueue[Any]) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(30):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            with pytest.raises(InterruptedError):
                put_and_lease_for_ever(q)
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            assert set(q.get_many(block=False) if not q.empty() else []) <= {"a"}
            assert q.buffer_occupancy() == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- items that can't be decoded, or kill


def test_what_cannot_be_decoded_is_in_the_error_and_off_the_queue(q: ShmQueue[Any]) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put(b"strange", serialization_method=2000)
    with pytest.raises(ShmQueueDeserializationError) as caught:
        q.lease()
    assert (caught.value.payload, caught.value.serialization_method) == (b"strange", 2000)
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


def test_ctrl_c_while_decoding_gives_back(q: ShmQueue[Any]) -> None:
    def interrupted(method: int, chunks: list[memoryview]) -> Any:
        raise KeyboardInterrupt

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(interrupted)
    q.put(b"a", serialization_method=2000)
    with pytest.raises(KeyboardInterrupt):
        q.lease()
    q.custom_deserialize(lambda method, chunks: bytes(chunks[0]))
    assert q.lease().item == b"a"


@pytest.fixture
def dead(queue_name: str) -> Iterator[Callable[[], ShmQueue[Any]]]:
    """Opens the dead-letter queue; empties it at the end, as it stays while there is something in it."""
    yield lambda: ShmQueue[Any](queue_name + ".dead")
    with ShmQueue[Any](queue_name + ".dead") as letters:
        letters.clear()


BOMBS = [
    "small",
    b"bytes" * 2000,
    np.arange(100_000),
    {"image": np.ones((300, 300)), "more": [np.zeros(50_000, "u1")], "t": 1.5},
]


@pytest.mark.parametrize("bomb", BOMBS, ids=["str", "bytes", "array", "nested arrays"])
def test_what_kills_its_consumers_is_moved_aside(
    q: ShmQueue[Any], dead: Callable[[], ShmQueue[Any]], bomb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    q.put_many([bomb, "next"])

    def hold() -> None:
        with q.lease(max_deliveries=3):
            die()

    for _ in range(3):
        assert in_child(hold) == -signal.SIGKILL
        assert q.qsize() == 2  # looks for the dead
    with caplog.at_level(logging.WARNING), q.lease(max_deliveries=3) as item:
        assert item == "next"
    assert "handed out 3 times and never released" in caplog.text
    with dead() as letters:
        assert letters.qsize() == 1
        found = letters.get()
    assert pickle.dumps(found) == pickle.dumps(bomb)
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


def test_one_that_kills_while_being_decoded_is_not_decoded_again(
    q: ShmQueue[Any], dead: Callable[[], ShmQueue[Any]]
) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put(b"x", serialization_method=2000)
    q.custom_deserialize(lambda method, chunks: die())
    for _ in range(2):
        assert in_child(lambda: q.lease(max_deliveries=2)) == -signal.SIGKILL
    with pytest.raises(ShmQueueEmpty):
        q.lease(block=False, max_deliveries=2)
    with dead() as letters:
        with pytest.raises(ShmQueueDeserializationError) as caught:
            letters.get_nowait()
        assert caught.value.payload == b"x"


def test_dead_letters_stay_when_everybody_has_left(queue_name: str, dead: Callable[[], ShmQueue[Any]]) -> None:
    with ShmQueue[Any](queue_name) as q:
        q.put_many(["bomb", "last"])
        q.lease().give_back()
        with q.lease(max_deliveries=1) as item:
            assert item == "last"
    with dead() as letters:
        assert letters.get_nowait() == "bomb"


def test_dead_letters_stay_whoever_leaves_last(queue_name: str, dead: Callable[[], ShmQueue[Any]]) -> None:
    with ShmQueue[Any](queue_name) as q:
        q.put("bomb")
        q.lease().give_back()
        with pytest.raises(ShmQueueEmpty):
            q.lease(block=False, max_deliveries=1)
    for _ in range(2):
        with dead() as letters:  # just looks
            assert letters.qsize() == 1
    with dead() as letters, pytest.raises(KeyError), letters.lease():
        raise KeyError
    with dead() as letters:
        assert letters.get_nowait() == "bomb"


def test_ctrl_c_while_a_letter_is_logged_leaves_it_in_one_queue(
    queue_name: str, dead: Callable[[], ShmQueue[Any]]
) -> None:
    log = logging.getLogger(queue_name)
    log.addFilter(lambda record: signal.raise_signal(signal.SIGINT) or True)
    with ShmQueue[Any](queue_name, logger=log) as q, dead() as letters:
        q.put("bomb")
        q.lease().give_back()
        with pytest.raises(KeyboardInterrupt):
            q.lease(block=False, max_deliveries=1)
        assert (q.qsize(), q.buffer_occupancy(), letters.qsize()) == (0, 0, 1)


def test_no_name_for_a_dead_letter_queue_is_said_at_once() -> None:
    with ShmQueue[Any]("n" * 196) as q:
        q.put("good")
        with pytest.raises(ShmQueueValueError, match="takes 201 bytes when quoted, at most 200"):
            q.lease(max_deliveries=1)
        assert q.lease().deliveries == 1
        q.clear()


def test_a_full_dead_letter_queue_is_said_and_loses_nothing(queue_name: str, dead: Callable[[], ShmQueue[Any]]) -> None:
    with ShmQueue[Any](queue_name) as q, dead() as letters:
        letters.put(bytes(4000))
        q.put(bytes(1000))
        q.lease().give_back()
        with pytest.raises(ShmQueueFull, match=r"\.dead': no room"):
            q.lease(max_deliveries=1)
        assert q.qsize() == 1
        letters.get()
        with pytest.raises(ShmQueueEmpty):
            q.lease(block=False, max_deliveries=1)
        assert letters.qsize() == 1


# ---- threads


def test_nobody_finds_a_lease_that_waits_for_its_item(q: ShmQueue[Any]) -> None:
    waiting = threading.Thread(target=lambda: q.lease(timeout=5).release())
    waiting.start()
    found: list[Any] = []
    for _ in range(50):
        found += [each for each in gc.get_objects() if type(each) is Lease]
        time.sleep(0.002)
    q.put("a")
    waiting.join()
    assert found == []


def test_the_last_lease_of_a_closed_queue_waits_for_others_without_the_gil(queue_name: str) -> None:
    q = ShmQueue[Any](queue_name)
    q.put("a")
    lease = q.lease()
    q.shutdown()
    ready, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # is in the middle of attaching
        file = os.open(f"/dev/shm/shmqueue.{queue_name}", os.O_RDWR)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    releasing = threading.Thread(target=lease.release)
    start = time.monotonic()
    releasing.start()
    time.sleep(0.2)  # this thread goes on
    took = time.monotonic() - start
    os.write(go_on[1], b"x")
    os.waitpid(pid, 0)
    releasing.join()
    for end in (*ready, *go_on):
        os.close(end)
    assert took < 2.5
    assert not os.path.exists(f"/dev/shm/shmqueue.{queue_name}")
