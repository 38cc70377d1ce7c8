"""When a request may be made: shared pace, a gate that a server can close, and a circuit breaker.

Objects of one event loop. Times are seconds of a monotonic `clock`; `ends` is when the caller's
deadline is over. Whoever cannot be let through before it is told so at once, by `EndpointDown`,
instead of being kept waiting in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from society.errors import EndpointDown

Clock = Callable[[], float]

BURST_S = 10.0
"""Seconds' worth of a rate that may be used at once after a quiet time."""
FAILURES = 3
"""Failed questions in a row that open the circuit."""
OPEN_S = 30.0
"""How long it stays open the first time; twice as long after each trial that fails."""
LONGEST_OPEN_S = 600.0
LONGEST_SILENCE_S = 3_600.0
"""The longest wait that a server may ask for."""


class Pace:
    """A rate shared by all, in units per minute; first come, first served.

    A token bucket that may go into debt, so that a request of any size gets its turn. Each caller
    gets its turn when it comes, which is what makes it fair; all turns move up when an earlier
    request used less than was thought.
    """

    def __init__(self, per_minute: float | None, clock: Clock = time.monotonic) -> None:
        """None for no limit."""
        self._s_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._paid_until = 0.0
        self._moved_s = 0.0
        self._moved = asyncio.Event()

    async def wait(self, units: float, ends: float) -> None:
        """Wait for the turn of a request of so many units.

        Raises:
            EndpointDown: The turn would come after the deadline; nothing is used up.
        """
        now = self._clock()
        turn = self._paid_until - BURST_S
        if turn > ends:
            raise EndpointDown(
                f"The configured rate leaves no room for a request within {ends - now:.0f} s: "
                "raise endpoint.requests_per_minute or tokens_per_minute, or use fewer agents.",
                retry_in_s=turn - now,
            )
        self._paid_until = max(self._paid_until, now) + units * self._s_per_unit
        turn -= self._moved_s
        try:
            while (left := turn + self._moved_s - self._clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._moved.wait(), left)
        except asyncio.CancelledError:
            self.correct(-units)
            raise

    def correct(self, units: float) -> None:
        """Count so many units more; fewer if negative."""
        self._paid_until += units * self._s_per_unit
        self._moved_s += units * self._s_per_unit
        self._moved.set()
        self._moved = asyncio.Event()


class Gate:
    """Open until a server asks for silence; then closed to all for that long."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """The gate is open."""
        self._clock = clock
        self._closed_until = 0.0

    @property
    def closed_s(self) -> float:
        """Seconds for which it stays closed; 0 if it is open."""
        return max(0.0, self._closed_until - self._clock())

    def close(self, seconds: float) -> None:
        """Keep it closed for so long from now; never opens it earlier."""
        until = self._clock() + min(seconds, LONGEST_SILENCE_S)
        self._closed_until = max(self._closed_until, until)

    async def wait(self, ends: float) -> None:
        """Wait until it is open.

        Raises:
            EndpointDown: It opens after the deadline.
        """
        while (left := self.closed_s) > 0:
            if self._closed_until > ends:
                raise EndpointDown(
                    f"The endpoint asked to be left alone for another {left:.0f} s.",
                    retry_in_s=left,
                )
            await asyncio.sleep(left)


@dataclass(frozen=True, slots=True)
class Pass:
    """The permission to ask."""

    trial: bool
    """Whether this question decides if the circuit closes again."""


class Circuit:
    """Stops asking an endpoint that fails; one question at a time tries whether it works again."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """The circuit is closed: questions pass."""
        self._clock = clock
        self._failures = 0
        self._open_s = OPEN_S
        self._until: float | None = None
        self._trial = False
        self._last = ""

    @property
    def closed(self) -> bool:
        """Whether questions pass."""
        return self._until is None

    @property
    def retry_in_s(self) -> float:
        """Seconds until a trial; 0 if it may be made now, or if the circuit is closed."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    def enter(self) -> Pass:
        """Ask for permission; the pass must be given to `leave`, whatever happens.

        Raises:
            EndpointDown: The circuit is open.
        """
        if self._until is None:
            return Pass(trial=False)
        left = self.retry_in_s
        if left > 0 or self._trial:
            when = f"in {left:.0f} s" if left > 0 else "just now"
            raise EndpointDown(
                f"The endpoint failed repeatedly and is tried again {when}. Last: {self._last}",
                retry_in_s=left,
            )
        self._trial = True
        return Pass(trial=True)

    def leave(self, admitted: Pass, worked: bool | None, problem: str = "") -> None:
        """Say how it went. None: nothing was learnt about the endpoint."""
        if admitted.trial:
            self._trial = False
        if worked:
            self._failures, self._open_s, self._until = 0, OPEN_S, None
        elif worked is False:
            self._last = problem
            self._count(admitted)

    def _count(self, admitted: Pass) -> None:
        """Failures of questions that were under way when the circuit opened prove nothing new."""
        if admitted.trial:
            self._open_s = min(2 * self._open_s, LONGEST_OPEN_S)
            self._until = self._clock() + self._open_s
        elif self._until is None:
            self._failures += 1
            if self._failures >= FAILURES:
                self._until = self._clock() + self._open_s
