"""What the processes of an executor are told: once when they start, and for every run."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from enum import StrEnum

from society.experiments.processes import HEADER, Message
from society.experiments.sandbox import Level
from society.experiments.task import Role
from society.records import Budget, BudgetKind, Split, Variant, Work

DISK_BYTES = 2 << 30
"""What a run with foreign code may write."""


class Post(StrEnum):
    """What a loop is for."""

    TRAINER = "trainer"
    SCORER = "scorer"
    MODEL = "model"
    """Holds the model that is scored."""
    PROBE = "probe"
    """Holds the same model, and is asked what the other one must not have known."""


ROLES = {Post.TRAINER: Role.TRAINER, Post.SCORER: Role.SCORER}
"""The data that a loop holds; the others hold none."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is started with; one JSON argument on its command line."""

    task: str
    profile: str
    device: str
    """As the user gave it, `cuda` for all cards; in a loop, the device of its slot."""
    owner: int
    """Process id of the owner."""
    scratch: str
    """Folder of this executor; the zygote removes it at the end."""
    link: int
    """File descriptor of the control socket."""
    level: str = ""
    """How far runs are confined; empty for as far as this machine can."""
    require: str = Level.FILTERS
    """The least for foreign code."""
    lint: bool = True
    """Whether foreign code is looked through before it runs."""
    disk_bytes: int = DISK_BYTES
    """What a run with foreign code may write."""


def message_of(work: Work) -> Message:
    """Work as JSON values."""
    variant = work.variant
    return {
        "run_id": work.run_id,
        "variant": {
            "task": variant.task,
            "overrides": dict(variant.overrides),
            "patch": variant.patch,
        },
        "seed": work.seed,
        "data_seed": work.data_seed,
        "split": work.split,
        "budget": {"kind": work.budget.kind, "amount": work.budget.amount},
    }


def work_of(values: Message) -> Work:
    """Back from what `message_of` made of it."""
    return Work(
        run_id=values["run_id"],
        variant=Variant(**values["variant"]),
        seed=values["seed"],
        split=Split(values["split"]),
        budget=Budget(BudgetKind(values["budget"]["kind"]), values["budget"]["amount"]),
        data_seed=values["data_seed"],
    )


def receive(link: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and the descriptors that came with it; None if the other side is gone."""
    header, handles, _, _ = socket.recv_fds(link, HEADER, 4)
    header += _exactly(link, HEADER - len(header)) if header else b""
    body = _exactly(link, int.from_bytes(header, "big")) if header else b""
    return (json.loads(body), handles) if body else None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = link.recv(size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data
