"""Which accelerator each slot works on: a pure function of what was found there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from society.model.device import GIB, Card

FREE_SHARE = 0.9
"""Share of a card's free memory that runs may fill together."""
CONTEXT_BYTES = GIB
"""What a process holds on a card beside its tensors: the context, loaded kernels."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Slots and their cards."""

    devices: tuple[str, ...]
    """One per slot, e.g. `cuda:0`; a card that is shared appears more than once."""
    reason: str
    """Why there are so many, in one line for the user."""


def place(cards: Sequence[Card], *, need_bytes: int, seconds: bool, asked: int | None) -> Placement:
    """Spread slots over cards of one model.

    Args:
        cards: What was found, at least one. Cards of another model than the first one's are left
            out: their scores could not be compared.
        need_bytes: Device memory of one run, as the profile's limit states it; 0 for unknown.
        seconds: Whether the budget counts seconds. Runs that share a card take turns, so that
            seconds would buy less the more of them there are: such runs get a card each.
        asked: Most slots that the user wants; None for as many as fit.
    """
    alike = [card for card in cards if card.label == cards[0].label]
    room = {card.device: _fitting(card, need_bytes, seconds=seconds) for card in alike}
    turns = range(max(room.values()))
    places = [device for turn in turns for device, count in room.items() if turn < count]
    devices = tuple(places[:asked] if asked else places)
    return Placement(devices, _reason(cards, alike, devices, need_bytes, seconds=seconds))


def _fitting(card: Card, need_bytes: int, *, seconds: bool) -> int:
    if seconds or not need_bytes:
        return 1
    return max(1, int(card.free_bytes * FREE_SHARE // (need_bytes + CONTEXT_BYTES)))


def _reason(
    cards: Sequence[Card],
    alike: Sequence[Card],
    devices: Sequence[str],
    need_bytes: int,
    *,
    seconds: bool,
) -> str:
    if seconds:
        why = "one run per card, because the budget is in seconds and shared cards would buy less"
    elif not need_bytes:
        why = "one run per card, because the profile states no limits.mem_bytes"
    else:
        why = f"runs of {need_bytes / GIB:.3g} GiB share a card's free memory"
    words = [f"{len(devices)} slots on {len(set(devices))} x {cards[0].label}: {why}"]
    left_out = sorted({card.label for card in cards} - {cards[0].label})
    if left_out:
        words.append(f"not used, because scores are compared on one model: {', '.join(left_out)}")
    return "; ".join(words)
