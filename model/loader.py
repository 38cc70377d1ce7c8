"""Batches made by a thread ahead of time, and on their way to the accelerator before they are due.

The same batches in the same order as without it: one thread draws them from the source, the caller
takes them. On a CPU the thread only draws ahead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

AHEAD = 3
"""Batches that are waiting at most."""
POLL_S = 0.1
"""How often a waiting thread looks whether it was told to stop."""


class _End:
    """What the thread leaves behind when it has nothing more to give."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Loader:
    """An iterator of batches on the device. Close it, or use it as a context.

    The source is used by the loader's thread alone from here on. What it raises is raised to the
    caller, after the batches that came before.
    """

    def __init__(self, source: Iterator[np.ndarray], device: str, ahead: int = AHEAD) -> None:
        """Start the thread.

        Args:
            source: Batches, int64, each of any shape.
            device: Where they go.
            ahead: Batches kept waiting.
        """
        self._source, self._device = source, device
        self._ready: queue.Queue[tuple[Tensor, torch.cuda.Event | None] | _End] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._stream = None if device == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> Tensor:
        """The next batch, on the device, in the order of the source."""
        if self._stop.is_set():
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, _End):
            self._stop.set()
            if found.error is not None:
                raise found.error
            raise StopIteration
        batch, arrived = found
        if arrived is not None:  # the consumer's queue waits for the copy, the host does not
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            batch.record_stream(current)
        return batch

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
        """Stop the thread and forget what is waiting. May be called again."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room for a thread that is waiting to hand something over
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(POLL_S)

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            for array in self._source:
                if not self._hand_over(self._send(array)):
                    return
        except BaseException as problem:  # noqa: BLE001 - raised again where it is seen
            error = problem
        self._hand_over(_End(error))

    def _send(self, array: np.ndarray) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start the copy to the device on a stream of its own."""
        batch = torch.from_numpy(array)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            sent = batch.pin_memory().to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return sent, arrived

    def _hand_over(self, item: tuple[Tensor, torch.cuda.Event | None] | _End) -> bool:
        """Wait for room; False when told to stop."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False
