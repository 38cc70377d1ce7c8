"""`Recollection`: a society's recall, which may be lost and come back.

The society goes on without it. It is tried again after 5, 10, 20, 40 and then every 60 seconds,
with one line in the log when it is lost and one when it is back; it catches up from where it was,
because what has to be indexed waits in the ledger.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

from society import logs
from society.errors import RecallUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from society.memory.ledger import Ledger
    from society.memory.recall import Hit, Recall

T = TypeVar("T")

FIRST_RETRY_S = 5.0
LAST_RETRY_S = 60.0
TURN_S = 5.0
"""How long a sync may take; what it leaves is indexed in the next one."""


class Recollection:
    """Recall that is opened when it is first used, and again after it was lost.

    `sync` and `search` may be called from different threads; a search does not wait for a sync.
    """

    def __init__(
        self,
        ledger: Ledger,
        open_recall: Callable[[], Recall],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is opened yet.

        Args:
            ledger: What recall is fed from.
            open_recall: Opens it; raises RecallUnavailable.
            clock: Seconds, for the time between attempts.
        """
        self._ledger, self._open, self._clock = ledger, open_recall, clock
        self._recall: Recall | None = None
        self._broken: Recall | None = None
        self._last: Recall | None = None
        self._users = 0
        self._lock = threading.Lock()
        self._wait_s = 0.0
        self._next_try = float("-inf")
        self._log = logs.get("recall")

    @property
    def is_down(self) -> bool:
        """Whether the last attempt to use it failed."""
        return self._wait_s > 0

    def sync(self) -> int:
        """Index what is new in the ledger; the number of lines read, 0 while recall is down."""
        return self._use(lambda recall: recall.sync(self._ledger, within_s=TURN_S), 0)

    def search(self, text: str, k: int) -> Sequence[Hit]:
        """Nearest prose in the notebook; empty while recall is down."""
        return self._use(lambda recall: recall.search(text, k), ())

    def last_sync(self) -> int:
        """A sync that does not wait for the next attempt's time, before the society ends."""
        self._next_try = float("-inf")
        return self.sync()

    def behind(self) -> int | None:
        """Lines of the outbox that are not indexed yet; None where the index was never reached."""
        return None if self._last is None else self._last.behind(self._ledger)

    def close(self) -> None:
        """Give it back."""
        with self._lock:
            if self._recall is not None:
                self._recall.close()
            self._recall = None

    def _use(self, use: Callable[[Recall], T], otherwise: T) -> T:
        try:
            recall = self._opened()
        except RecallUnavailable as error:
            self._lost(None, error)
            return otherwise
        if recall is None:
            return otherwise
        try:
            found = use(recall)
        except RecallUnavailable as error:
            self._lost(recall, error)
            return otherwise
        else:
            self._back(recall)
            return found
        finally:
            self._leave()

    def _opened(self) -> Recall | None:
        with self._lock:
            due = self._broken is None and self._clock() >= self._next_try
            if self._recall is None and due:
                self._recall = self._last = self._open()
            if self._recall is not None:
                self._users += 1
            return self._recall

    def _leave(self) -> None:
        """Close a broken one once nobody uses it any more, so that the next attempt starts anew."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._broken is not None:
                self._broken.close()
                self._broken = None

    def _lost(self, recall: Recall | None, error: RecallUnavailable) -> None:
        with self._lock:
            if recall is not self._recall:  # another thread has noticed before
                return
            self._broken, self._recall = recall, None
            if not self.is_down:
                self._log.warning("recall is off; the society goes on", reason=str(error))
            self._wait_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, 2 * self._wait_s))
            self._next_try = self._clock() + self._wait_s

    def _back(self, recall: Recall) -> None:
        with self._lock:
            if recall is not self._recall:
                return
            if self.is_down:
                self._log.warning("recall is back", at=str(recall))
            self._wait_s = 0.0
