/* docs.h - the docstrings of the calls that are in C; first the signature, as inspect reads it. */
#ifndef SHMQUEUE_DOCS_H
#define SHMQUEUE_DOCS_H

#include <Python.h>

/* clang-format off */

PyDoc_STRVAR(put_doc,
"put($self, data, block=True, timeout=None, serialization_method=0)\n--\n\n"
"Put an item at the end of the queue.\n\n"
"Once this has returned the item can be got, whatever becomes of this process.\n\n"
"Args:\n"
"    data: The item. None, bool, int, float, str, bytes, list and dict take 8 + len(msgpack.packb(data))\n"
"        bytes, everything else 8 + len(pickle.dumps(data, 5)), numpy arrays a little more.\n"
"    block: Wait for room; otherwise raise ShmQueueFull when there is none now.\n"
"    timeout: Seconds to wait at most; None waits without end. Ignored unless block.\n"
"    serialization_method: One of SerializationMethods, or an id of your own from 1001 on.\n"
"Raises:\n"
"    ShmQueueFull: it didn't fit in time.\n"
"    ShmQueueValueError: it is larger than the queue, or the timeout is negative.\n"
"    ShmQueueSerializationError: it can't be turned into bytes.\n"
"    NotImplementedError: there is no serializer for the method.\n"
"    ShmQueueNotInitializedError: the handle has been shut down.\n"
"    In each case the queue is unchanged.");

PyDoc_STRVAR(put_nowait_doc,
"put_nowait($self, data, serialization_method=0)\n--\n\n"
"The same as put(data, block=False).");

PyDoc_STRVAR(put_many_doc,
"put_many($self, items, block=True, timeout=None, serialization_method=0)\n--\n\n"
"Put the items of an iterable; return how many.\n\n"
"Those of a list, tuple or range go many at a time. Of any other iterable each item is in the queue before the next\n"
"one is asked for. The other arguments are those of put(); the timeout is for all of them. Other producers' items\n"
"may come between.\n\n"
"Raises:\n"
"    As put() does, and what the iterable raises. Every error has `.accepted`, how many items went in and\n"
"    stay in, and `.remaining`, an iterator over the others that begins with the one not accepted.");

PyDoc_STRVAR(get_doc,
"get($self, block=True, timeout=None)\n--\n\n"
"Remove and return the oldest item.\n\n"
"Args:\n"
"    block: Wait for an item; otherwise raise ShmQueueEmpty when there is none now.\n"
"    timeout: Seconds to wait at most; None waits without end. Ignored unless block.\n"
"Raises:\n"
"    ShmQueueEmpty: no item came in time.\n"
"    ShmQueueDeserializationError: its bytes can't be turned back; they are in `.payload`, and off the queue.\n"
"    ShmQueueNotInitializedError: the handle has been shut down, here or by another thread meanwhile.");

PyDoc_STRVAR(get_nowait_doc,
"get_nowait($self)\n--\n\n"
"The same as get(block=False).");

PyDoc_STRVAR(get_many_doc,
"get_many($self, max_items=None, block=True, timeout=None)\n--\n\n"
"Remove and return up to max_items items, oldest first, waiting for the first one only.\n\n"
"Args:\n"
"    max_items: Most items to take, 1 or more; None takes all that are there now.\n"
"    block, timeout: As for get().\n"
"Returns:\n"
"    A list of 1..max_items items.\n"
"Raises:\n"
"    As get() does. When a later item than the first can't be turned back, those before it are returned, the\n"
"    error comes at the next call, and what follows it stays in the queue. Any other exception, such as Ctrl-C's,\n"
"    comes at once; items taken before it are in its `.received`, if there were any.");

PyDoc_STRVAR(lease_method_doc,
"lease($self, block=True, timeout=None, max_deliveries=None, copy=True)\n--\n\n"
"Claim the oldest item and keep it in the queue until the lease ends: at-least-once delivery.\n\n"
"    with q.lease(timeout=2.0) as item:\n"
"        work_on(item)\n\n"
"At the end of the block the item is released, that is, gone. After an exception, and when the process dies, it is\n"
"given back: it is delivered again, before newer items. Leases may be held long, be many (1024 in a queue at a time)\n"
"and end in any order; meanwhile others get the items behind. The item's bytes stay in use until it is released, and\n"
"the bytes behind them can't be used again before: a queue may become full behind a lease.\n\n"
"Args:\n"
"    block, timeout: As for get().\n"
"    max_deliveries: How often an item may be handed out. One that would be once more is moved to the queue\n"
"        '<name>.dead' instead, undecoded, since it may be what kills its consumers. Default: no limit.\n"
"    copy: False gives bytes as a read-only memoryview of the queue itself, and contiguous arrays of 32 KiB and more\n"
"        as read-only views of it. They are valid until the lease ends. Then memoryviews are released, and arrays\n"
"        become unusable, where variables, containers and instances of Python classes are all that refers to them;\n"
"        else they keep the item claimed, and a warning is logged once.\n"
"Returns:\n"
"    A Lease: a context manager that gives the item; or use its `item`, `deliveries`, release() and give_back().\n"
"    One that is forgotten is given back, once nothing shows it.\n"
"Raises:\n"
"    As get() does; an item that can't be turned back is off the queue, and in the error.\n"
"    ShmQueueFull: the dead-letter queue is full; the item was given back.\n"
"    ShmQueueValueError: the item is larger than the whole dead-letter queue, which is older than this one, and was\n"
"        given back; or the name is too long for one that ends in '.dead'.");

PyDoc_STRVAR(lease_doc,
"An item that is claimed and stays in the queue until the lease ends; made by ShmQueue.lease().\n\n"
"As a context manager it gives the item; leaving releases it, or after an exception gives it back. In a child\n"
"forked meanwhile leaving does nothing: the lease is the parent's.");

PyDoc_STRVAR(lease_release_doc,
"release($self)\n--\n\n"
"The item is done with, and leaves the queue.\n\n"
"Raises:\n"
"    ShmQueueRuntimeError: the lease is over already, or is that of the process that this one was forked from.");

PyDoc_STRVAR(lease_give_back_doc,
"give_back($self)\n--\n\n"
"The item goes back to the front of the queue and is delivered again, before newer items.\n\n"
"Raises:\n"
"    ShmQueueRuntimeError: as release() does.");

PyDoc_STRVAR(qsize_doc, "qsize($self)\n--\n\nItems put and not yet taken or leased, at the instant of the call.");
PyDoc_STRVAR(empty_doc, "empty($self)\n--\n\nWhether there is no item, at the instant of the call.");
PyDoc_STRVAR(full_doc, "full($self)\n--\n\nWhether not a single byte is free, at the instant of the call.");
PyDoc_STRVAR(occupancy_doc,
"buffer_occupancy($self)\n--\n\n"
"Bytes of the ring in use, at the instant of the call: the items in it, those being put, and\n"
"those being copied out or leased.");
PyDoc_STRVAR(max_buffer_size_doc, "max_buffer_size($self)\n--\n\nBytes of the ring, as the queue was created.");
PyDoc_STRVAR(clear_doc,
"clear($self)\n--\n\n"
"Drop every item that nobody has in hand; puts that are under way stay.");

#endif
