"""The floor: one agent at a time reads, decides and writes; the others wait in line.

While an agent awaits a training run it gives the floor away, so experiments run side by side but
decisions never race. The order is a rule, not an accident of timing: first agents in line that
have something to do, in order of arrival; then agents that come back with a finished run. With one
slot the whole society is therefore a repeatable sequence.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Waiter:
    ready: Callable[[], bool]
    turn: asyncio.Future[None]


class Floor:
    """A fair lock whose waiters can say whether they have anything to do.

    Belongs to one event loop. `quiet` is set while all `members` wait in line and none of them is
    ready: nothing can change any more unless somebody `poke`s.
    """

    def __init__(self, members: int) -> None:
        """Expect so many members."""
        self._members = members
        self._line: deque[_Waiter] = deque()
        self._back: deque[_Waiter] = deque()
        self._taken = False
        self.quiet = asyncio.Event()

    async def enter(self, ready: Callable[[], bool]) -> None:
        """Wait in line until the floor is free and `ready()` holds."""
        await self._wait(self._line, ready)

    async def come_back(self) -> None:
        """Take the floor again after a run; goes after everyone in line who is ready."""
        await self._wait(self._back, lambda: True)

    def leave(self) -> None:
        """Give the floor to the next one."""
        self._taken = False
        self.poke()

    def poke(self) -> None:
        """Look through the line again, because something outside has changed."""
        if self._taken:
            return
        waiter = self._next()
        if waiter is not None:
            self._taken = True
            self.quiet.clear()
            waiter.turn.set_result(None)
        elif len(self._line) == self._members:
            self.quiet.set()

    async def _wait(self, queue: deque[_Waiter], ready: Callable[[], bool]) -> None:
        waiter = _Waiter(ready, asyncio.get_running_loop().create_future())
        queue.append(waiter)
        self.poke()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in queue:
                queue.remove(waiter)
            elif waiter.turn.done() and not waiter.turn.cancelled():
                self.leave()
            raise

    def _next(self) -> _Waiter | None:
        for queue in (self._line, self._back):
            for waiter in queue:
                if not waiter.turn.done() and waiter.ready():
                    queue.remove(waiter)
                    return waiter
        return None
