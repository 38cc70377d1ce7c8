"""How long `python -m society --help` takes: the median and the best of several fresh processes.

Usage: python benchmarks/startup.py [repeats]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LIMIT_S = 0.5
"""The design's promise."""


def measure(*arguments: str) -> float:
    """Seconds that one fresh process takes."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "society", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def main() -> None:
    """Measure and compare with the promise."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    measure("--help")  # fills the caches of bytecode and files
    for arguments in (("--help",), ("run", "--help"), ("memory", "--help")):
        times = [measure(*arguments) for _ in range(repeats)]
        median, best = statistics.median(times), min(times)
        verdict = "within" if median < LIMIT_S else "ABOVE"
        print(
            f"society {' '.join(arguments):<14} median {median:.3f} s, best {best:.3f} s "
            f"({verdict} the promised {LIMIT_S} s)"
        )


if __name__ == "__main__":
    main()
