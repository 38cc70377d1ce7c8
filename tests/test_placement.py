"""Slots on accelerators: which card, how many, and why; and that a slot's runs go to its card."""

import asyncio
from pathlib import Path

import pytest

from society.experiments import load_task
from society.experiments.executor import describe
from society.experiments.local import LocalExecutor
from society.experiments.placement import CONTEXT_BYTES, Placement, place
from society.model.device import GIB, Card
from society.records import Budget, BudgetKind, Split, Variant, Work


def card(number: int, name: str = "NVIDIA H100 80GB HBM3", free: float = 70.0) -> Card:
    return Card(f"cuda:{number}", name, "sm_90", 80 * GIB, int(free * GIB))


def placed(
    cards: list[Card], need: float, asked: int | None = None, *, seconds: bool = False
) -> Placement:
    need_bytes = int(need * GIB)
    return place(cards, need_bytes=need_bytes, seconds=seconds, asked=asked)


def test_runs_share_a_card_when_they_fit() -> None:
    assert CONTEXT_BYTES == GIB
    assert placed([card(0)], need=20).devices == ("cuda:0",) * 3  # .9 x 70 // (20 + 1)
    assert placed([card(0)], need=200).devices == ("cuda:0",)
    assert placed([card(0), card(1, free=21)], need=20).devices == (
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:0",
    )


def test_no_more_slots_than_asked_for_and_spread_over_the_cards() -> None:
    cards = [card(0), card(1)]
    assert placed(cards, need=20, asked=2).devices == ("cuda:0", "cuda:1")
    assert placed(cards, need=20, asked=1).devices == ("cuda:0",)
    assert len(placed(cards, need=20, asked=50).devices) == 6


def test_budgets_in_seconds_never_share_a_card() -> None:
    alone = placed([card(0), card(1)], need=5, asked=8, seconds=True)
    assert alone.devices == ("cuda:0", "cuda:1")
    assert "one run per card, because the budget is in seconds" in alone.reason


def test_an_unknown_need_is_not_guessed() -> None:
    alone = placed([card(0)], need=0)
    assert alone.devices == ("cuda:0",)
    assert "limits.mem_bytes" in alone.reason


def test_cards_of_another_model_are_left_out_and_named() -> None:
    mixed = [card(0), card(1, name="NVIDIA GeForce RTX 4090"), card(2)]
    found = placed(mixed, need=60)
    assert found.devices == ("cuda:0", "cuda:2")
    assert "RTX 4090" in found.reason


# ------------------------------------------------------------------- in real processes

PLACED = """
from misbehaving import Misbehaving
from society.experiments import Limits
from society.model import device
from society.records import Budget, BudgetKind

CARDS = tuple(
    device.Card(f"cuda:{n}", "Fake 24GB", "sm_0", 24 << 30, 20 << 30) for n in (0, 1)
)
device.cards = lambda name: () if name == "cpu" else CARDS


class Placed(Misbehaving):
    packages = ("torch",)
    limits = Limits(timeout_s=20.0, mem_bytes=7 << 30)

    def train(self, recipe, seed, budget, scratch, device, **more):
        print("trained on", device, flush=True)
        return super().train(recipe, seed, budget, scratch, device, **more)

    def score(self, scratch, recipe, split, device):
        print("scored on", device, flush=True)
        return super().score(scratch, recipe, split, device)


class Timed(Placed):
    budget = Budget(BudgetKind.SECONDS, 1.0)
"""


@pytest.fixture
def _two_fake_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose workers see two cards of 20 free GiB; it is imported by each of them."""
    (tmp_path / "placed.py").write_text(PLACED)
    for folder in (tmp_path, Path(__file__).parent):
        monkeypatch.syspath_prepend(str(folder))


def logs_of(task: str, slots: int | None) -> tuple[LocalExecutor, list[str]]:
    """Four runs that take a moment each, at once."""
    variant = Variant("misbehaving/test", {"act": "sleep", "sleep_s": 0.3})
    works = [
        Work(f"r{n}", variant, n, Split.VALIDATION, Budget(BudgetKind.STEPS, 10)) for n in range(4)
    ]

    async def main() -> tuple[LocalExecutor, list[str]]:
        executor = LocalExecutor(task, "test", slots, "cuda")
        await executor.start()
        try:
            found = await asyncio.gather(*[executor.run(work) for work in works])
            return executor, [measured.log_tail for measured in found]
        finally:
            executor.kill()

    return asyncio.run(main())


@pytest.mark.usefixtures("_two_fake_cards")
def test_a_slots_runs_are_made_on_its_card() -> None:
    executor, logs = logs_of("placed:Placed", None)
    assert executor.slots == 4  # two of 7 + 1 GiB in .9 x 20, on each of two cards
    assert sorted(logs) == [f"trained on cuda:{n}\nscored on cuda:{n}" for n in (0, 0, 1, 1)]
    assert executor.environment.device == "cuda:Fake 24GB"
    assert executor.environment.tier == "cuda:Fake_24GB-sm_0"


@pytest.mark.usefixtures("_two_fake_cards")
def test_a_budget_in_seconds_gets_a_card_for_each_run() -> None:
    executor, logs = logs_of("placed:Timed", 3)
    assert executor.slots == 2
    assert {log.split()[2] for log in logs} == {"cuda:0", "cuda:1"}


def test_the_environment_says_what_the_bits_depend_on() -> None:
    here = describe(load_task("pretrain", "cpu"), "cpu")
    assert here.tier == f"cpu-{here.capability}"
    assert here.arithmetic
    assert here.arithmetic not in here.tier
