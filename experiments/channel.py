"""Arrays between two processes that do not trust each other.

A frame is a header of fixed size and the array's bytes, in C order, little-endian:

    magic        4 bytes, `SOC1`
    type         1 byte, one of `TYPES`
    dimensions   1 byte, at most 4
    zero         2 bytes
    shape        4 x 8 bytes, unsigned; those beyond the dimensions are 0

Nothing in it is ever executed or unpickled, and a receiver compares the size with its own bound
before it takes memory for it. bf16, which numpy does not know, travels as int16.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import stat
import struct
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from society.experiments.task import Refused

MAGIC = b"SOC1"
HEADER = struct.Struct("<4sBBH4Q")
TYPES = tuple(np.dtype(name) for name in ("<i8", "<i4", "<i2", "<f4"))
"""The types that an array may have; a header says which one by its place."""
MAX_DIMENSIONS = 4
MAX_BYTES = 256 << 20
"""Largest array by default."""
ROOM_BYTES = 1 << 20
"""What a pipe or socket is asked to hold: fewer changes between the processes."""
F_SETPIPE_SZ = 1031


class ArrayChannel:
    """One end of a line that carries arrays; see `society.experiments.task.Channel`.

    Not thread-safe. Owns its descriptors: `close` closes them. Both are made non-blocking, and no
    call takes longer than until the deadline.

    Raises `Refused` in every method: garbage, an array above the bound, an end in the middle of
    one, or the deadline. Nothing can be sent or received afterwards.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        *,
        deadline: float = math.inf,
        most_bytes: int = MAX_BYTES,
        peer: str = "the model",
        after: ArrayChannel | None = None,
    ) -> None:
        """Take over two descriptors; they may be one and the same, of a socket.

        Args:
            reading: Descriptor of a pipe or a stream socket.
            writing: The same, for the other direction.
            deadline: By `time.monotonic`, for everything that this end ever does.
            most_bytes: Largest array that is received.
            peer: Who is on the other side, for messages.
            after: Another line, which is hung up as soon as this one is used.
        """
        self._reading, self._writing = reading, writing
        self._deadline, self._most_bytes, self._peer = deadline, most_bytes, peer
        self._after = after
        for handle in {reading, writing}:
            os.set_blocking(handle, False)
            _widen(handle)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Leave: the other side receives None. May be called again."""
        for handle in {self._reading, self._writing} - {-1}:
            with contextlib.suppress(OSError):
                os.close(handle)
        self._reading = self._writing = -1

    def hang_up(self) -> None:
        """Leave, also where other processes hold copies of the descriptors, if they are sockets."""
        for handle in {self._reading, self._writing} - {-1}:
            copy = os.dup(handle)
            try:
                with socket.socket(fileno=copy) as line:
                    line.shutdown(socket.SHUT_RDWR)
            except OSError:  # a pipe, or the other side has left
                with contextlib.suppress(OSError):
                    os.close(copy)
        self.close()

    def _begin(self) -> None:
        """Hang up the line that must be over by now."""
        if self._after is not None:
            self._after.hang_up()
            self._after = None

    def send(self, array: np.ndarray) -> None:
        """Send one array; returns when all of it has left this process.

        Raises:
            Refused: The other side has left or does not take it in time, or the array is of a kind
                that cannot be sent.
        """
        self._begin()
        kind = array.dtype.newbyteorder("<")
        if kind not in TYPES or array.ndim > MAX_DIMENSIONS:
            raise Refused(f"an array {array.dtype} of {array.ndim} dimensions cannot be sent")
        shape = (*array.shape, *(0,) * (MAX_DIMENSIONS - array.ndim))
        self._write(HEADER.pack(MAGIC, TYPES.index(kind), array.ndim, 0, *shape))
        self._write(_flat(np.ascontiguousarray(array, kind)))

    def receive(self, most_bytes: int | None = None) -> np.ndarray | None:
        """The next array; None when the other side has left.

        Args:
            most_bytes: Bound for this one; by default that of the channel.

        Raises:
            Refused: What came is no array, is larger than the bound, ends in the middle, or is
                late.
        """
        self._begin()
        header = bytearray(HEADER.size)
        if not self._read(memoryview(header), may_end=True):
            return None
        kind, shape = self._parsed(bytes(header))
        # Python's integers cannot overflow; a 0 must not hide an extent that numpy cannot have.
        size = math.prod(max(1, extent) for extent in shape) * kind.itemsize
        most = self._most_bytes if most_bytes is None else most_bytes
        if size > most:
            raise Refused(f"{self._peer} sent an array of {size} bytes; at most {most} are taken")
        array = np.empty(shape, kind)
        self._read(_flat(array), may_end=False)
        return array

    def _parsed(self, header: bytes) -> tuple[np.dtype, Sequence[int]]:
        magic, code, dimensions, zero, *shape = HEADER.unpack(header)
        if magic != MAGIC or zero or code >= len(TYPES) or dimensions > MAX_DIMENSIONS:
            raise Refused(f"{self._peer} sent something that is no array")
        if any(shape[dimensions:]):
            raise Refused(f"{self._peer} sent an array with a malformed shape")
        return TYPES[code], shape[:dimensions]

    def _read(self, room: memoryview, *, may_end: bool) -> bool:
        """Fill `room`; False if the other side left before its first byte."""
        filled = 0
        while filled < len(room):
            try:
                count = os.readv(self._reading, [room[filled:]])
            except BlockingIOError:
                self._wait(self._reading, select.POLLIN)
                continue
            except OSError:  # a socket whose other end was killed
                count = 0
            if not count:
                if may_end and not filled:
                    return False
                raise Refused(f"{self._peer} left in the middle of an answer")
            filled += count
        return True

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._writing, left) :]
            except BlockingIOError:
                self._wait(self._writing, select.POLLOUT)
            except OSError as error:
                raise Refused(f"{self._peer} left before it was asked everything") from error

    def _wait(self, handle: int, event: int) -> None:
        """Until the descriptor is ready, or the deadline."""
        left_s = self._deadline - time.monotonic()
        poll = select.poll()
        poll.register(handle, event)
        ready = left_s > 0 and poll.poll(None if math.isinf(left_s) else math.ceil(left_s * 1e3))
        if not ready:
            raise Refused(f"{self._peer} took too long to answer")


def _flat(array: np.ndarray) -> memoryview:
    """The array's own memory as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _widen(handle: int) -> None:
    """Ask for room for a whole answer; there is as much as the system allows."""
    if stat.S_ISSOCK(os.fstat(handle).st_mode):
        with socket.socket(fileno=os.dup(handle)) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES)
    elif sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # more than the system allows
            fcntl.fcntl(handle, F_SETPIPE_SZ, ROOM_BYTES)
