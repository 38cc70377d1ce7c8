"""Hardware tiers in words: which class of machine a tier belongs to.

Scores are compared within one exact tier only (`Environment.tier`, e.g. `cpu-AVX512`); a class
groups tiers for display: CPUs by instruction set, GPUs by memory. Two tiers of one class are
listed side by side and never compared.
"""

from __future__ import annotations

import re

GIB = 2**30
GPU_CLASSES_GB = (16, 24, 48)
"""Upper ends of the classes of GPU memory; more than the last is a class of its own."""
UNKNOWN_GPU = "GPU of unknown memory"


def class_of(tier: str, mem_bytes: int = 0) -> str:
    """The class of a tier, e.g. `CPU AVX512` or `GPU up to 24 GB`.

    Args:
        tier: As `Environment.tier` names it.
        mem_bytes: Memory of the accelerator; 0 where it was not recorded: then the size in the
            device's name counts, which makers round to what a card is sold as.
    """
    if tier.startswith("cpu-"):
        return f"CPU {tier.removeprefix('cpu-')}"
    sold_as = re.findall(r"(\d+(?:\.\d+)?)[ _]?gb\b|(\d+(?:\.\d+)?)[ _]?gb(?=[_-])", tier.lower())
    sizes = [float(first or second) for first, second in sold_as]
    gigabytes = mem_bytes / GIB if mem_bytes else (sizes[-1] if sizes else 0.0)
    if gigabytes <= 0:
        return UNKNOWN_GPU
    for limit in GPU_CLASSES_GB:
        if gigabytes <= limit:
            return f"GPU up to {limit} GB"
    return f"GPU over {GPU_CLASSES_GB[-1]} GB"


def order(tier_class: str) -> tuple[int, int, str]:
    """For sorting classes: CPUs first, then GPUs by memory, unknown ones last."""
    if tier_class.startswith("CPU"):
        return (0, 0, tier_class)
    found = re.search(r"\d+", tier_class)
    over = "over" in tier_class
    return (1, int(found[0]) + over if found else 10**6, tier_class)
