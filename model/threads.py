"""One thread, so that the same seed gives the same bits."""

from __future__ import annotations

import torch


def single_thread() -> None:
    """Let torch use one thread in this process.

    Two threads on busy cores were slower than one, and another thread count gives other bits. Call
    it once at the start of a worker, before any tensor work; forked children inherit it.
    """
    torch.set_num_threads(1)
