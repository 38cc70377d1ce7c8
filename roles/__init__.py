"""Roles: what agents do. Subclass `Role` to add one; see docs/roles.md."""

from society.records import RunKind
from society.roles.base import (
    Brain,
    BudgetLeft,
    Charter,
    Duty,
    Knowledge,
    Lab,
    Outcome,
    Proposal,
    Refused,
    Result,
    Role,
)
from society.roles.registry import known_roles, load_role
from society.roles.view import View

__all__ = [
    "Brain",
    "BudgetLeft",
    "Charter",
    "Duty",
    "Knowledge",
    "Lab",
    "Outcome",
    "Proposal",
    "Refused",
    "Result",
    "Role",
    "RunKind",
    "View",
    "known_roles",
    "load_role",
]
