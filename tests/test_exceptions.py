"""Each error is the builtin that users expect and a ShmQueueException, and travels by pickle."""

from __future__ import annotations

import errno
import pickle
import queue
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from shmqueue import exceptions
from shmqueue.exceptions import ShmQueueException, system_error, with_progress

BUILTINS = {
    "ShmQueueEmpty": queue.Empty,
    "ShmQueueFull": queue.Full,
    "ShmQueueValueError": ValueError,
    "ShmQueueTypeError": TypeError,
    "ShmQueueBufferOverflow": OverflowError,
    "ShmQueueRuntimeError": RuntimeError,
    "ShmQueueCorruptedError": exceptions.ShmQueueRuntimeError,
    "ShmQueueNotInitializedError": RuntimeError,
    "ShmQueueSerializationError": Exception,
    "ShmQueueNoSerializerError": NotImplementedError,
    "ShmQueueDeserializationError": Exception,
    "ShmQueueNoDeserializerError": NotImplementedError,
    "ShmQueueOSError": OSError,
}
OS_ERRORS = {
    errno.EACCES: PermissionError,
    errno.EPERM: PermissionError,
    errno.ENOENT: FileNotFoundError,
    errno.EISDIR: IsADirectoryError,
    errno.ETIMEDOUT: TimeoutError,
    errno.ENOSPC: OSError,
    errno.EROFS: OSError,
}


def make(name: str) -> ShmQueueException:
    kind = getattr(exceptions, name)
    if issubclass(kind, exceptions.ShmQueueDeserializationError):
        return kind("a message", payload=b"\x00\xff", serialization_method=1001)
    return kind("a message")


def fail_in_a_pool(name: str) -> None:
    raise with_progress(make(name), 3, (item for item in "rest"))


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_error_is_also_the_builtin(name: str, builtin: type[Exception]) -> None:
    error = make(name)
    assert isinstance(error, ShmQueueException)
    assert isinstance(error, builtin)
    assert str(error) == "a message"


def test_all_errors_are_exported() -> None:
    defined = {name for name in vars(exceptions) if name.startswith("ShmQueue")}
    assert defined == {*BUILTINS, "ShmQueueException"}
    assert defined == set(exceptions.__all__)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", BUILTINS)
def test_error_survives_pickling(name: str, protocol: int) -> None:
    error = make(name)
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)


def test_error_travels_through_a_process_pool() -> None:
    with ProcessPoolExecutor(1) as pool:
        for name in BUILTINS:
            error = pool.submit(fail_in_a_pool, name).exception(timeout=60)
            assert isinstance(error, getattr(exceptions, name))
            assert error.accepted == 3
            assert list(error.remaining) == []
            if isinstance(error, exceptions.ShmQueueDeserializationError):
                assert (error.payload, error.serialization_method) == (b"\x00\xff", 1001)


@pytest.mark.parametrize(("number", "builtin"), OS_ERRORS.items())
def test_system_error_is_the_builtin_of_its_errno(number: int, builtin: type[OSError]) -> None:
    error = system_error(number, "queue 'jobs': refused")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is type(error)
        assert isinstance(each, (builtin, exceptions.ShmQueueOSError))
        assert isinstance(each, ShmQueueException)
        assert (each.errno, each.strerror) == (number, "queue 'jobs': refused")
        assert str(each) == f"[Errno {number}] queue 'jobs': refused"


def test_system_error_is_caught_as_the_builtin() -> None:
    with pytest.raises(PermissionError):
        raise system_error(errno.EACCES, "queue 'jobs': another user's")


def test_an_error_of_put_alone_says_that_nothing_is_pending() -> None:
    error = exceptions.ShmQueueFull("full")
    assert error.accepted == 0
    assert list(error.remaining) == []


@pytest.mark.parametrize("error", [exceptions.ShmQueueFull("full"), ValueError("not mine")])
def test_progress_of_put_many_goes_with_any_error_and_loses_no_item(error: Exception) -> None:
    def items() -> Iterator[int]:
        yield from range(5)

    source = items()
    next(source)
    marked = with_progress(error, 1, source)
    assert marked is error
    assert pickle.loads(pickle.dumps(marked)).accepted == 1
    assert list(marked.remaining) == [1, 2, 3, 4]  # type: ignore[attr-defined]
