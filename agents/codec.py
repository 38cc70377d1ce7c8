"""Entries as plain JSON, for the checkpointed state of an agent between `perform` and `commit`."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import TypeAdapter

from society.records import Entry
from society.roles.base import Duty

_ENTRIES = {kind.__name__: TypeAdapter(kind) for kind in get_args(Entry)}
_DUTY = TypeAdapter(Duty)


def dump_entry(entry: Entry) -> dict[str, Any]:
    """An entry as JSON types, tagged with its kind."""
    kind = type(entry).__name__
    return {
        "kind": kind,
        "value": _ENTRIES[kind].dump_python(entry, mode="json", fallback=dict, warnings=False),
    }


def load_entry(data: dict[str, Any]) -> Entry:
    """The entry that `dump_entry` made `data` from."""
    entry: Entry = _ENTRIES[data["kind"]].validate_python(data["value"])
    return entry


def dump_duty(duty: Duty) -> dict[str, Any]:
    """A duty as JSON types."""
    plain: dict[str, Any] = _DUTY.dump_python(duty, mode="json")
    return plain


def load_duty(data: dict[str, Any]) -> Duty:
    """The duty that `dump_duty` made `data` from."""
    return _DUTY.validate_python(data)
