"""When steps end, by the device's own clock, without keeping the device waiting for the host.

An accelerator works through what the host has queued. If the host asked after every step how it
ended, the queue would run dry each time. So a step leaves a `Mark` behind, and the host reads the
mark of a step `ahead` steps later, when it is (almost) always reached.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

AHEAD = 4
"""Steps that may be queued on an accelerator and not be finished."""


class Mark(Protocol):
    """A point in the device's work."""

    def read(self) -> tuple[float, float]:
        """Wait for it; seconds since the start, and the value that was marked."""


class Timeline(Protocol):
    """The device's clock for one run. Used by one thread."""

    ahead: int
    """Steps that may be launched before the oldest one's mark is read."""

    def start(self) -> None:
        """Wait until the device is idle, and begin to count."""

    def mark(self, value: Tensor) -> Mark:
        """A mark behind all work launched so far, with a scalar of it."""


@dataclass(frozen=True, slots=True)
class _Reached:
    """A mark of a device that works while the host waits."""

    seconds: float
    value: float

    def read(self) -> tuple[float, float]:
        return self.seconds, self.value


class HostTimeline:
    """The CPU: a step has ended when its call returns."""

    ahead = 0

    def __init__(self) -> None:
        """Begin to count now; `start` begins anew."""
        self._started = time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._started = time.perf_counter()

    def mark(self, value: Tensor) -> Mark:
        """Reached as soon as it is made."""
        return _Reached(time.perf_counter() - self._started, value.item())


@dataclass(frozen=True, slots=True)
class _Recorded:
    """An event in an accelerator's queue, behind a copy of the value to the host."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    value: Tensor
    """On the host, pinned; there once `end` is reached."""

    def read(self) -> tuple[float, float]:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3, self.value.item()


class CudaTimeline:
    """An accelerator's own clock: events in its queue."""

    ahead = AHEAD

    def __init__(self, device: str) -> None:
        """For one device."""
        self._device = device
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Wait until the device is idle, and begin to count."""
        torch.cuda.synchronize(self._device)
        self._start.record(torch.cuda.current_stream(self._device))

    def mark(self, value: Tensor) -> Mark:
        """Queue an event, and a copy of the value before it."""
        copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        copy.copy_(value, non_blocking=True)
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self._device))
        return _Recorded(self._start, end, copy)


def timeline_of(device: str) -> Timeline:
    """The clock of a device."""
    return HostTimeline() if device == "cpu" else CudaTimeline(device)


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that has ended."""

    step: int
    """Counted from 1."""
    progress: float
    """Share of the run that was done before it."""
    loss: float
    seconds: float
    """From the start of the run to its end."""


class Flight:
    """The steps of one run: launched, then landed in order."""

    def __init__(self, timeline: Timeline) -> None:
        """Start the clock."""
        self._timeline = timeline
        self._launched = 0
        self._open: deque[tuple[int, float, Mark]] = deque()
        self._last = Landed(0, 0.0, 0.0, 0.0)
        timeline.start()

    @property
    def launched(self) -> int:
        """Steps launched so far."""
        return self._launched

    @property
    def seconds(self) -> float:
        """When the last step that landed had ended."""
        return self._last.seconds

    @property
    def expected_s(self) -> float:
        """When all steps launched so far will have ended, if they take as long as those before."""
        if not self._last.step:
            return 0.0
        return self._last.seconds * self._launched / self._last.step

    def launch(self, loss: Tensor, progress: float) -> None:
        """A step was queued; `loss` is a scalar on the device."""
        self._launched += 1
        self._open.append((self._launched, progress, self._timeline.mark(loss)))

    def land(self, *, everything: bool = False) -> Iterator[Landed]:
        """Steps that have ended, oldest first; waits until few enough are left open."""
        left = 0 if everything else self._timeline.ahead
        while len(self._open) > left:
            step, progress, mark = self._open.popleft()
            seconds, loss = mark.read()
            self._last = Landed(step, progress, loss, seconds)
            yield self._last
