"""Processes that race for leases on both backends, some of them killed while they hold one."""

from __future__ import annotations

import pytest
from racing import SCOPE, Race, judged, race, variant

from society.memory.ledger import Ledger

TTL_S = 3.0


@pytest.fixture(params=["sqlite", "postgres"])
def address(request, tmp_path):
    """Where an empty ledger can be made."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.sqlite")
    return request.getfixturevalue("postgres_url")


def check(wanted: Race) -> None:
    """Make the race; everything is done once, and nothing that was acknowledged is lost."""
    result = race(wanted)
    assert (result.doubles, result.lost, result.repeated, result.missing) == (0, 0, 0, 0)
    assert result.leases >= wanted.fingerprints
    assert result.refusals > 0
    assert result.killed == round(wanted.killed * wanted.processes)
    assert result.orphans_done_after_s < float("inf")


def test_processes_race_for_fingerprints(address):
    check(Race(address, processes=8, fingerprints=200))


def test_a_fifth_of_the_holders_is_killed(address):
    """What they held is done by others once their leases have expired."""
    check(Race(
        address, processes=10, fingerprints=200, work_s=0.1, ttl_s=TTL_S, killed=0.2,
        kill_within_s=1.0,
    ))  # fmt: skip


def test_the_count_notices_what_went_wrong(address, tmp_path):
    """A run that was acknowledged and is not there, a fingerprint nobody ran, a second lease."""
    with Ledger.open(address) as ledger:
        society = ledger.start_society(1, {}).id
        for name in ("racer-0", "racer-1"):
            lease = ledger.lease_screening(
                SCOPE, society, holder=name, variant=variant(0), ttl_s=60
            )
            ledger.release(lease)
    (tmp_path / "0.log").write_text("r99999\n")
    found = judged(Race(address, processes=2, fingerprints=1), tmp_path, 1.0, {})
    assert (found.doubles, found.lost, found.missing) == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("killed", [0.0, 0.2])
def test_64_processes_and_10_000_fingerprints(address, killed):
    check(Race(
        address, processes=64, fingerprints=10_000, work_s=0.2 * bool(killed), ttl_s=10.0,
        killed=killed, kill_within_s=10.0,
    ))  # fmt: skip
