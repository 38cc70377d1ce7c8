"""One thread, so that the same seed gives the same bits; and memory that is not handed back."""

from __future__ import annotations

import ctypes

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""


def single_thread() -> None:
    """Let torch use one thread in this process.

    Two threads on busy cores were slower than one, and another thread count gives other bits. Call
    it once at the start of a worker, before any tensor work; forked children inherit it.
    """
    torch.set_num_threads(1)


def keep_pages() -> bool:
    """Let glibc keep freed memory, up to 1 GiB of it, instead of returning it to the system.

    By default every tensor above 128 kB or so is unmapped when it is freed, and the next one of
    its size costs a page fault per 4 kB: 3,900 faults and a fifth of the time of a small model's
    step. Changes no result. Returns whether it took effect: elsewhere than under glibc it does
    nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = {TRIM_THRESHOLD: 1 << 30, TOP_PAD: 1 << 26, MMAP_THRESHOLD: 1 << 25}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
