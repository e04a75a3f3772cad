"""The Linux calls the sandbox needs and Python 3.11 does not offer: namespaces, mounts, capabilities, seccomp.

Sources: unshare(2), setns(2), mount(2), pivot_root(2), capset(2), prctl(2), seccomp(2). Every function raises
OSError with the call's name when the kernel says no.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_THREAD = 0x00010000
CLONE_ANY_NAMESPACE = 0x7E020000  # user, pid, net, ipc, uts, cgroup and mount

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

_CAPABILITY_VERSION_3 = 0x20080522
_SECCOMP_MODE_FILTER = 2
_EPERM, _ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, *arguments: object) -> None:
    try:
        call = getattr(_libc, name)
    except AttributeError as error:
        raise OSError(_ENOSYS, f"this C library has no {name}") from error
    if call(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Moves the caller (for CLONE_NEWPID: its next child) into fresh namespaces."""
    _checked("unshare", ctypes.c_int(flags))


def setns(descriptor: int, flags: int) -> None:
    """Joins the namespace behind a descriptor of /proc/PID/ns."""
    _checked("setns", ctypes.c_int(descriptor), ctypes.c_int(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    _checked(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )


def unmount(target: str, flags: int) -> None:
    """umount2(2)."""
    _checked("umount2", target.encode(), ctypes.c_int(flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _checked("pivot_root", new_root.encode(), put_old.encode())


def prctl(option: int, value: int) -> None:
    """prctl(2) with one integer argument."""
    zero = ctypes.c_ulong(0)
    _checked("prctl", ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero)


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets of the calling thread."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked("capset", header, (ctypes.c_uint32 * 6)())


# name: (x86_64, aarch64); None where the architecture never had the call.
_SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fork": (57, None),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mount": (165, 40),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "socket": (41, 198),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vfork": (58, None),
}
_ALWAYS_DENIED = [
    "add_key",
    "bpf",
    "chroot",
    "fsopen",
    "io_uring_setup",
    "keyctl",
    "mount",
    "move_mount",
    "open_tree",
    "perf_event_open",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "pivot_root",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "request_key",
    "setns",
    "socket",
    "umount2",
    "unshare",
    "userfaultfd",
]
# First argument is a process: allowed on oneself only where other people's processes are in sight.
_ABOUT_A_PROCESS = [
    "kill",
    "prlimit64",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "sched_setaffinity",
    "tgkill",
]
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Classic BPF over struct seccomp_data {int nr; u32 arch; u64 instruction_pointer; u64 args[6]}.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def seccomp_program(*, own_pid: int | None, may_fork: bool, may_make_directories: bool) -> bytes:
    """The filter as struct sock_filter[]: a deny-list that answers EPERM.

    Args:
        own_pid: where the process can see others (no pid namespace), the only pid it may signal; else None.
        may_fork: False forbids new processes (threads stay allowed).
        may_make_directories: False forbids mkdir.
    Raises:
        OSError: this machine's architecture is not in the table.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(_ENOSYS, f"no seccomp filter for {machine}")
    column, audit_arch = _ARCHITECTURES[machine]
    deny = _op(_RETURN, _ERRNO | _EPERM)
    load_number = _op(_LOAD, _NUMBER_AT)

    def on(name: str, body: bytes) -> bytes:
        number = _SYSCALLS[name][column]
        return b"" if number is None else _op(_JUMP_EQUAL, number, 0, len(body) // 8) + body

    code = _op(_LOAD, _ARCH_AT) + _op(_JUMP_EQUAL, audit_arch, 1, 0) + _op(_RETURN, _KILL) + load_number
    code += (
        _op(_JUMP_AT_LEAST, 0x40000000, 0, 1) + deny
    )  # the x32 numbering of x86_64 would slip past the list
    denied = list(_ALWAYS_DENIED)
    denied += [] if may_fork else ["fork", "vfork"]
    denied += [] if may_make_directories else ["mkdir", "mkdirat"]
    denied += [] if own_pid is None else ["tkill", "setpriority"]
    for name in denied:
        code += on(name, deny)
    # The flags of clone3 lie behind a pointer the filter cannot follow; with ENOSYS the C library uses clone.
    code += on("clone3", _op(_RETURN, _ERRNO | _ENOSYS))
    load_argument = _op(_LOAD, _ARGUMENT_AT)
    clone = load_argument + _op(_JUMP_ANY_BIT, CLONE_ANY_NAMESPACE, 0, 1) + deny
    if not may_fork:
        clone += _op(_JUMP_ANY_BIT, CLONE_THREAD, 1, 0) + deny
    code += on("clone", clone + _op(_RETURN, _ALLOW))
    if own_pid is not None:
        about = load_argument + _op(_JUMP_EQUAL, own_pid, 2, 0) + _op(_JUMP_EQUAL, 0, 1, 0) + deny
        for name in _ABOUT_A_PROCESS:
            code += on(name, about + _op(_RETURN, _ALLOW))
    return code + _op(_RETURN, _ALLOW)


def install_seccomp(program: bytes) -> None:
    """Installs a filter for the caller and all it will fork; needs PR_SET_NO_NEW_PRIVS."""
    code = ctypes.create_string_buffer(program, len(program))

    class SockFprog(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filters = SockFprog(len(program) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _checked("prctl", ctypes.c_int(PR_SET_SECCOMP), mode, ctypes.byref(filters), zero, zero)
