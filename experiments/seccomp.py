"""A seccomp filter: which system calls a confined process may make.

Everything that is not named here stays allowed, but for calls that are newer than this list, which
look as if the kernel did not have them. A refused call fails with EPERM, which Python raises as
`PermissionError`. The tables are those of Linux on x86-64 and on 64-bit Arm.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

# name: numbers on x86-64 and on aarch64, None where there is no such call
CALLS: dict[str, tuple[int | None, int | None]] = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "setsid": (112, 157),
    "setpgid": (109, 154), "prctl": (157, 167), "fcntl": (72, 25), "ioctl": (16, 29),
    # new processes and programs
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    # the kernel itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "personality": (135, 92),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "vhangup": (153, 58), "lookup_dcookie": (212, 18),
    # files by another way than their path, and watching them
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "mknod": (133, None), "mknodat": (259, 33),
    # memory that no limit counts
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # what Landlock does not look at: modes, owners, times, attributes
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    # what it looks at only from kernel 6.2 on
    "truncate": (76, 45), "open": (2, None), "openat": (257, 56), "openat2": (437, 437),
    # what two processes that may only read a file can tell each other by
    "flock": (73, 32), "futex": (202, 98), "futex_waitv": (449, 449), "futex_wake": (454, 454),
    "futex_wait": (455, 455), "futex_requeue": (456, 456), "mincore": (27, 232),
    "fadvise64": (221, 223), "cachestat": (451, 451), "preadv2": (327, 286),
    "madvise": (28, 233), "statfs": (137, 43), "fstatfs": (138, 44), "ustat": (136, None),
    "fallocate": (285, 47),
}  # fmt: skip
NEWEST = 462
"""Highest call number that this list was made with (Linux 6.10)."""
OTHERS = (
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease",
    "kcmp", "pidfd_getfd",
)  # fmt: skip
NETWORK = ("socket", "connect", "bind", "listen", "accept", "accept4")
PROGRAMS = ("execve", "execveat")
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
TUNING = (
    "prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr",
    "migrate_pages", "move_pages",
)  # fmt: skip
"""Calls whose first argument is a process, 0 for the caller."""
GROUPS = ("setsid", "setpgid")
METADATA = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
    "utime", "utimes", "utimensat", "futimesat",
)  # fmt: skip
SHARED = ("shmget", "shmat", "shmctl", "msgget", "semget", "mq_open", "mq_unlink", "memfd_secret")
SYSTEM = (
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "unshare", "setns", "kexec_load", "kexec_file_load",
    "bpf", "perf_event_open", "add_key", "request_key", "keyctl", "userfaultfd",
    "io_uring_setup", "io_uring_enter", "io_uring_register", "swapon", "swapoff", "reboot",
    "init_module", "finit_module", "delete_module", "acct", "quotactl", "quotactl_fd", "syslog",
    "sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt", "settimeofday",
    "clock_settime", "clock_adjtime", "adjtimex", "vhangup", "lookup_dcookie",
    "open_by_handle_at", "name_to_handle_at", "fanotify_init", "fanotify_mark", "inotify_init",
    "inotify_init1", "mknod", "mknodat",
)  # fmt: skip

MARKS = (
    "flock",
    "mincore",
    "fadvise64",
    "cachestat",
    "preadv2",
    "statfs",
    "fstatfs",
    "ustat",
    "fallocate",
)
"""Locks, what is in the system's memory of a file, how full the disk is, room in it unwritten."""
FUTEXES = ("futex_waitv", "futex_wake", "futex_wait", "futex_requeue")

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}
SET_MODE_FILTER = 1
SPEC_ALLOW = 1 << 2
"""Without it, kernels before 5.16 slow the whole process down."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, JUMP, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x05, 0x06
NR, ARCH, ARGUMENTS = 0, 4, 16
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

CLONE_THREAD = 0x10000
CLONE_NEW = 0x7E020000
"""Every flag of clone(2) that makes a namespace."""
AF_UNIX, TYPES, STREAM, SEQPACKET = 1, 0xF, 1, 5
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
QUERY = 0xFFFFFFFF
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
"""Typing into a terminal."""
F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY = 8, 10, 15, 1026
FIOSETOWN, SIOCSPGRP = 0x8901, 0x8902
"""Having the kernel send somebody a signal when a file is ready."""
OF_DESCRIPTORS = (0, 1, 2, 3, 4, 1030, 1031, 1032, 1034)
"""Commands of fcntl(2) about a descriptor, not about the file: no locks, leases and hints."""
TERMINALS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Asking whether a file is a terminal and how large, what waits to be read, and closing on exec."""
FILE_SYSTEMS = (0x6600, 0x5800, 0x9400)
"""Families of ioctl(2) that change a file, its flags and attributes, or its file system."""
FAMILY = 0xFF00
FUTEX_PRIVATE = 128
MADV_COLD, MADV_PAGEOUT = 20, 21


@dataclass(frozen=True, slots=True)
class Rules:
    """What a filter lets through."""

    itself: int
    """Process id of the caller; without forks, the only one that it may signal or tune."""
    forks: bool = False
    """Whether it may start processes; threads it always may."""
    programs: bool = False
    """Whether it may execute programs."""
    alone: bool = False
    """Whether it has a process namespace: all that it can reach, or leave behind, is its own."""
    scoped: bool = False
    """Whether Landlock keeps its signals to its own processes, which it does from version 6 on."""
    truncates: bool = True
    """Whether Landlock looks after truncation, which it does from version 3 on."""
    metadata: bool = False
    """Whether it may change modes, owners and times, because it sees no files of others."""
    anonymous: bool = False
    """Whether it may make files in memory, which CUDA needs and no limit counts."""


@cache
def machine() -> str | None:
    """The architecture, if there is a table for it and this process speaks it."""
    name = platform.machine()
    known = name in AUDIT and sys.maxsize > 2**32 and sys.byteorder == "little"
    return name if known and sys.platform == "linux" else None


def program(rules: Rules) -> bytes:
    """The filter, as instructions of the kernel's packet filter."""
    name = machine()
    if name is None:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {platform.machine()}")
    column = 0 if name == "x86_64" else 1
    body = [*_op(LOAD, ARCH), *_op(EQUAL, AUDIT[name], 1, 0), *_op(RETURN, KILL)]
    body += [*_op(LOAD, NR), *_op(AT_LEAST, NEWEST + 1, 0, 1), *_refuse(errno.ENOSYS)]
    for call, answer in _answers(rules).items():
        number = CALLS[call][column]
        if number is not None:
            body += [*_op(EQUAL, number, 0, len(answer)), *answer]
    return b"".join([*body, *_op(RETURN, ALLOW)])


def install(filter_: bytes) -> None:
    """Filter this thread, and what it starts, from now on. Needs no_new_privs."""
    name = machine()
    assert name is not None, "program() has refused"
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(filter_, len(filter_))
    head = struct.pack("HxxxxxxQ", len(filter_) // 8, ctypes.addressof(code))
    where = ctypes.create_string_buffer(head, len(head))
    flags = ctypes.c_long(SPEC_ALLOW)
    if libc.syscall(ctypes.c_long(SECCOMP[name]), ctypes.c_long(SET_MODE_FILTER), flags, where):
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel takes no seccomp filter: {os.strerror(number)}")


def _answers(rules: Rules) -> dict[str, list[bytes]]:
    """Call -> what is done when it is made; calls that are not among them are allowed."""
    refused = [*NETWORK, *OTHERS, *SYSTEM, *SHARED]
    refused += [] if rules.anonymous else ["memfd_create"]
    refused += [] if rules.programs else PROGRAMS
    refused += [] if rules.metadata else METADATA
    refused += [] if rules.forks else ["fork", "vfork"]
    answers = {call: _refuse() for call in refused}
    answers["io_uring_setup"] = answers["clone3"] = _refuse(errno.ENOSYS)  # there are other ways
    answers["clone"] = _clone(rules.forks)
    answers["socketpair"] = _socketpair()
    answers["prctl"] = _but_not(0, PR_SET_PDEATHSIG, PR_SET_DUMPABLE)
    answers["personality"] = _only(0, QUERY)
    answers["ioctl"] = _but_not(1, TIOCSTI, TIOCLINUX)
    if not rules.truncates:
        answers |= {"truncate": _refuse(), "openat2": _refuse(errno.ENOSYS)}
        answers |= {"open": _opening(1), "openat": _opening(2)}
    if not rules.alone:
        answers |= _among_others(rules)
    answers["ioctl"] = [*_argument(1), *_family(), *answers["ioctl"]]
    return answers if rules.forks else answers | _silent()


def _silent() -> dict[str, list[bytes]]:
    """What a single process has no need of, and could tell another one something by.

    Landlock does not look at it: a file that may only be read can be locked, marked or thrown out
    of memory, and waited on, if two have it mapped.
    """
    answers = {call: _refuse() for call in MARKS}
    answers |= {call: _refuse(errno.ENOSYS) for call in FUTEXES}
    answers["fcntl"] = _only(1, *OF_DESCRIPTORS)
    answers["ioctl"] = _only(1, *TERMINALS)
    answers["madvise"] = _but_not(2, MADV_COLD, MADV_PAGEOUT)
    again = _refuse(errno.EAGAIN)  # who waits for a thread's end asks again
    private = [*_argument(1), *_op(ANY_BIT, FUTEX_PRIVATE, 0, 1), *_op(RETURN, ALLOW)]
    return answers | {"futex": [*private, *again]}


def _family() -> list[bytes]:
    """Refuse the requests of file systems, as if this one had none."""
    none = _refuse(errno.ENOTTY)
    return [*_op(AND, FAMILY), *_jumps(FILE_SYSTEMS), *_op(JUMP, 1), *none]


def _among_others(rules: Rules) -> dict[str, list[bytes]]:
    """What a process must leave alone that shares the process numbers with all others."""
    answers = {call: _refuse() for call in (*GROUPS, "setpriority", "ioprio_set")}
    answers |= {call: _only(0, 0, rules.itself) for call in TUNING}
    if not rules.forks:
        answers |= {call: _only(0, rules.itself) for call in SIGNALS}
    elif not rules.scoped:
        answers |= {call: _refuse() for call in SIGNALS}
    if not (rules.forks and rules.scoped):
        answers |= {call: _refuse() for call in ("pidfd_open", "pidfd_send_signal")}
    answers["fcntl"] = _but_not(1, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY)
    answers["ioctl"] = _but_not(1, TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP)
    return answers


def _clone(forks: bool) -> list[bytes]:
    answer = [*_argument(0), *_op(ANY_BIT, CLONE_NEW, 0, 1), *_refuse()]
    if not forks:
        answer += [*_op(ANY_BIT, CLONE_THREAD, 1, 0), *_refuse()]
    return [*answer, *_op(RETURN, ALLOW)]


def _socketpair() -> list[bytes]:
    """Connected pairs only: a datagram socket can still send to any address."""
    kind = [
        *_argument(1),
        *_op(AND, TYPES),
        *_op(EQUAL, STREAM, 2, 0),
        *_op(EQUAL, SEQPACKET, 1, 0),
    ]
    family = [*_argument(0), *_op(EQUAL, AF_UNIX, 1, 0), *_refuse()]
    return [*family, *kind, *_refuse(), *_op(RETURN, ALLOW)]


def _opening(flags: int) -> list[bytes]:
    """Opening to read must not truncate."""
    truncates = [*_op(AND, os.O_TRUNC | os.O_ACCMODE), *_op(EQUAL, os.O_TRUNC, 0, 1)]
    return [*_argument(flags), *truncates, *_refuse(), *_op(RETURN, ALLOW)]


def _only(argument: int, *values: int) -> list[bytes]:
    """Refuse all but these values of an argument (its lower 32 bits)."""
    return [*_argument(argument), *_jumps(values), *_refuse(), *_op(RETURN, ALLOW)]


def _but_not(argument: int, *values: int) -> list[bytes]:
    """Refuse these values of an argument (its lower 32 bits)."""
    return [*_argument(argument), *_jumps(values), *_op(RETURN, ALLOW), *_refuse()]


def _jumps(values: Sequence[int]) -> list[bytes]:
    """Jump over the instruction behind these if one of them is loaded."""
    return [
        word for at, value in enumerate(values) for word in _op(EQUAL, value, len(values) - at, 0)
    ]


def _argument(number: int) -> list[bytes]:
    return _op(LOAD, ARGUMENTS + 8 * number)


def _refuse(number: int = errno.EPERM) -> list[bytes]:
    return _op(RETURN, ERRNO | number)


def _op(code: int, value: int, then: int = 0, otherwise: int = 0) -> list[bytes]:
    """One instruction; the jumps count from the next one."""
    return [struct.pack("HBBI", code, then, otherwise, value)]
