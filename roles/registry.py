"""Finding role classes: the entry-point group `society.roles`, or `module:Class`."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points

from society.errors import UnknownName, UsageError
from society.roles.base import Role

GROUP = "society.roles"


def known_roles() -> tuple[str, ...]:
    """Names of all installed roles, shipped and third-party."""
    return tuple(sorted(point.name for point in entry_points(group=GROUP)))


def load_role(name: str) -> Role:
    """Instantiate a role by its entry-point name or by `module:Class`.

    Modules are also looked for in the current directory.

    Raises:
        UnknownName: No such role is installed.
        UsageError: The module or class cannot be loaded, or is not a role.
    """
    cls = _from_path(name) if ":" in name else _from_group(name)
    if not (isinstance(cls, type) and issubclass(cls, Role)):
        raise UsageError(f"Role {name!r}: {cls!r} is not a subclass of society.roles.Role.")
    if not isinstance(getattr(cls, "name", None), str):
        raise UsageError(f"Role {name!r}: the class needs a `name`.")
    try:
        return cls()
    except TypeError as error:
        raise UsageError(f"Role {name!r} cannot be made: {error}.") from None


def _from_group(name: str) -> object:
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()
    raise UnknownName("role", name, known_roles())


def _from_path(path: str) -> object:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"Role {path!r}: cannot import {module_name}: {error}.") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UsageError(f"Role {path!r}: {module_name} has no {attribute!r}.") from None
