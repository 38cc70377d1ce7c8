"""The generators that are everybody's, set by the run's seed.

The trainer draws from generators of its own, keyed by what is drawn. Changed code may draw without
one, as dropout does or `torch.nn.init`: from here it gets other numbers for every seed, and the
same ones whenever a run is made again.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def set_seeds(seed: int, purpose: str, device: str = "cpu") -> None:
    """Set the generators of torch (and of the accelerator), numpy and Python.

    Args:
        seed: The run's.
        purpose: What is drawn next: other words, other numbers.
        device: A torch device.
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    torch.default_generator.manual_seed(key)
    if device != "cpu":
        torch.cuda.manual_seed_all(key)
    np.random.seed(key % (1 << 32))
    random.seed(key)
