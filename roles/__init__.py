"""Roles: what agents do. Subclass `Role` to add one; see docs/roles.md."""

from society.records import RunKind
from society.roles.base import (
    Advice,
    Background,
    Brain,
    BudgetLeft,
    Charter,
    Duty,
    Interrupted,
    Knowledge,
    Lab,
    Outcome,
    Proposal,
    Reader,
    Reading,
    Refused,
    Result,
    Review,
    Role,
)
from society.roles.registry import known_roles, load_role
from society.roles.view import View

__all__ = [
    "Advice",
    "Background",
    "Brain",
    "BudgetLeft",
    "Charter",
    "Duty",
    "Interrupted",
    "Knowledge",
    "Lab",
    "Outcome",
    "Proposal",
    "Reader",
    "Reading",
    "Refused",
    "Result",
    "Review",
    "Role",
    "RunKind",
    "View",
    "known_roles",
    "load_role",
]
