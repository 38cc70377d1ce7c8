"""How quickly a lease is given while many processes want one, and what kill -9 of some leaves.

64 processes race for 10,000 fingerprints on SQLite and on a PostgreSQL server of their own, which
waits for the disk as a real one does. Each takes a lease on one of the first fingerprints that are
not done, pretends to work, and finishes. Without work (`--work 0`) all of them want the ledger all
the time: what is measured then is its throughput, and a lease takes as long as the queue is. With
work the ledger is used as by a society, only much more so. In the last race a fifth of the
processes is killed, each at a random moment; what they held is to be done within two lease periods.

    make bench BENCH=contention
    python benchmarks/contention.py --backend sqlite --processes 8 --fingerprints 500
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from postgres import Server
from racing import Race, Result, race

HEAD = (
    f"{'backend':<10}{'work':>7}{'killed':>8}{'pairs/s':>9}{'lease p50':>11}{'p99':>8}"
    f"{'finish p50':>12}{'p99':>8}{'refused':>9}"
    f"{'double':>8}{'lost':>6}{'repeated':>10}{'missing':>9}"
)


def main() -> None:
    """Make the races and print one line for each."""
    options = _options()
    print(f"{options.processes} processes, {options.fingerprints} fingerprints; times in ms")
    print(HEAD)
    for backend in options.backend:
        for work_s in options.work:
            with _ledger(backend) as address:
                wanted = Race(address, options.processes, options.fingerprints, work_s, ttl_s=60)
                _print(backend, wanted, race(wanted, 3600))
        with _ledger(backend) as address:
            wanted = Race(
                address, options.processes, options.fingerprints, options.killed_work,
                ttl_s=options.lease, killed=0.2, kill_within_s=options.lease,
            )  # fmt: skip
            result = race(wanted, 3600)
            _print(backend, wanted, result)
            print(
                f"{'':<10}{result.orphans} leases of {result.killed} killed processes; the last of "
                f"that work was done {result.orphans_done_after_s:.1f} s after its holder's death "
                f"(two lease periods: {2 * options.lease:.0f} s)"
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="*", default=["sqlite", "postgres"])
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--fingerprints", type=int, default=10_000)
    parser.add_argument("--work", type=float, nargs="*", default=[0.0, 0.5, 1.0], help="seconds")
    parser.add_argument("--killed-work", type=float, default=0.5, help="in the last race")
    parser.add_argument("--lease", type=float, default=10.0, help="its lease period in seconds")
    return parser.parse_args()


@contextmanager
def _ledger(backend: str) -> Iterator[str]:
    """Where an empty ledger can be made."""
    if backend == "sqlite":
        with tempfile.TemporaryDirectory(prefix="society-contention-") as folder:
            yield str(Path(folder, "ledger.sqlite"))
        return
    server = Server(durable=True)
    try:
        with server.database() as address:
            yield address
    finally:
        server.remove()


def _print(backend: str, wanted: Race, result: Result) -> None:
    pairs = wanted.fingerprints / result.wall_s
    times = (result.lease_p50, result.lease_p99, result.finish_p50, result.finish_p99)
    lease, lease_99, finish, finish_99 = (f"{1000 * seconds:.1f}" for seconds in times)
    print(
        f"{backend:<10}{wanted.work_s:>6.1f}s{result.killed:>8}{pairs:>9.0f}{lease:>11}{lease_99:>8}"
        f"{finish:>12}{finish_99:>8}{result.refusals:>9}{result.doubles:>8}{result.lost:>6}"
        f"{result.repeated:>10}{result.missing:>9}",
        flush=True,
    )


if __name__ == "__main__":
    main()
