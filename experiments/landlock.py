"""Landlock: a Linux process gives up, for good, all files but those it names.

What is refused fails with EACCES, which Python raises as `PermissionError`. Files that are open
already stay usable. Versions of the interface: 1 (Linux 5.13), 2 moving between folders, 3 (6.2)
truncation, 4 TCP, 5 device controls, 6 (6.12) signals and abstract unix sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Iterable
from enum import IntFlag
from functools import cache

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on all architectures."""
VERSION = 1
PATH_BENEATH = 1
TRUNCATES, PORTS, SCOPES = 3, 4, 6
"""Versions from which on it looks after truncation, TCP ports, and signals."""
NET = 0b11
SCOPED = 0b11


class Right(IntFlag):
    """What may be done with files beneath a path."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Right.READ_FILE | Right.READ_DIR
CHANGE = (
    READ | Right.WRITE_FILE | Right.TRUNCATE | Right.REFER | Right.MAKE_REG | Right.MAKE_DIR
    | Right.REMOVE_FILE | Right.REMOVE_DIR
)  # fmt: skip
DEVICE = READ | Right.WRITE_FILE | Right.IOCTL_DEV
OF_FILES = (
    Right.EXECUTE | Right.READ_FILE | Right.WRITE_FILE | Right.TRUNCATE | Right.IOCTL_DEV
)  # fmt: skip
"""Rights that make sense for something that is no folder; the kernel takes no others there."""

Grant = tuple[str, Right]
"""A path that exists, and what may be done with all that lies beneath it."""


@cache
def version() -> int:
    """Version of the kernel's interface; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _call(CREATE_RULESET, None, 0, VERSION))


def restrict(grants: Iterable[Grant]) -> None:
    """Keep this thread, and what it starts, from every file that is not granted.

    TCP ports, abstract unix sockets and processes outside are out of reach too, as far as the
    kernel's version goes. Needs no_new_privs. Paths that are gone are passed over.

    Raises:
        OSError: The kernel does not do it.
    """
    handled = _handled(version())
    scope = struct.pack("QQQ", handled, NET if version() >= PORTS else 0, SCOPED)
    size = 24 if version() >= SCOPES else 16 if version() >= PORTS else 8
    rules = _call(CREATE_RULESET, scope, size, 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "the kernel has no Landlock")
    try:
        for path, rights in grants:
            with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
                _grant(rules, path, rights & handled)
        if _call(RESTRICT_SELF, rules, 0):
            raise OSError(ctypes.get_errno(), "Landlock refuses to restrict this process")
    finally:
        os.close(rules)


def _handled(known: int) -> int:
    newest = {1: Right.MAKE_SYM, 2: Right.REFER, 3: Right.TRUNCATE, 4: Right.TRUNCATE}
    return 2 * newest.get(known, Right.IOCTL_DEV) - 1


def _grant(rules: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= OF_FILES
        if rights and _call(ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, handle), 0):
            number = ctypes.get_errno()
            raise OSError(number, f"Landlock takes no rule for {path}: {os.strerror(number)}")
    finally:
        os.close(handle)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call; -1 and `ctypes.get_errno()` if it fails."""
    return int(_libc().syscall(number, *arguments))  # all are 32-bit numbers or pointers


def missing() -> tuple[str, str] | None:
    """Why there is no Landlock here, and what to do; None if there is."""
    if version():
        return None
    if sys.platform != "linux":
        return "only Linux has Landlock", "use Linux"
    if _call(CREATE_RULESET, None, 0, VERSION) and ctypes.get_errno() == errno.EOPNOTSUPP:
        return "Landlock is switched off", "add landlock to the kernel parameter lsm="
    return "the kernel has no Landlock", "use Linux 5.13 or newer"
