"""What a process goes through before it may read untrusted code, as far as the host allows.

A *plan* is one way to isolate; plans are tried from strongest to weakest and the first whose self-test passes is
used. The names of the layers really in force travel in every verdict:

    process     own session and process group, no inherited descriptors, empty environment, SIGKILL by the zygote
    rlimits     address space, CPU seconds, file size, open files, no core; hard = soft
    scratch     a working folder of its own, gone afterwards
    nproc       RLIMIT_NPROC that really bites; without it the program cannot fork at all
    uid         a user id nobody else has
    caps        no capabilities, and no way to gain any (no_new_privs)
    pidns mountns netns ipcns userns    Linux namespaces; mountns also means a root folder that holds only the
                Python installation and system libraries, read-only, and a small tmpfs
    seccomp     system calls a pure program has no use for answer EPERM (linux.seccomp_program)
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field

from fewstep.actors.sandbox import linux

_FIRST_JOB_UID = 0x60000000  # far above what distributions and user-id maps hand out
_INNER_ID = 1000  # not 0, so that an exec inside the user namespace gives no capability back
SYSTEM_PATHS = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/nix/store",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_STATVFS_TO_MOUNT = {
    2: linux.MS_NOSUID,
    4: linux.MS_NODEV,
    8: linux.MS_NOEXEC,
    1024: 1024,
    2048: 2048,
    4096: 1 << 21,
}
_UNSHARED = (
    linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
)


@dataclass(frozen=True)
class Caps:
    """Ceilings of one child; see limits.Limits for the units."""

    memory_bytes: int
    processes: int
    scratch_bytes: int
    open_files: int


@dataclass(frozen=True)
class Plan:
    """namespaces: enter them, as the privileged user or through a user namespace of our own; own_uid: give every
    child a user id of its own (privileged only)."""

    namespaces: bool
    user_namespace: bool
    own_uid: bool


def plans(mode: str) -> list[Plan]:
    """What to try, strongest first. mode: auto (namespaces, or else a user id per program, or else nothing: under the
    user's own id a program could change the user's files); require (namespaces or nothing); user (through a user
    namespace only, as somebody without privileges would); off (no namespaces, under the user's own id if need be)."""
    root = os.geteuid() == 0
    isolated = [Plan(True, False, True)] if root else []
    isolated.append(Plan(True, True, False))
    separate = [Plan(False, False, True)] if root else []
    return {
        "auto": isolated + separate,
        "require": isolated,
        "user": isolated[-1:],
        "off": [*separate, Plan(False, False, False)],
    }[mode]


@dataclass
class Isolation:
    """The isolation of one zygote. `enter` once, then `confine` in every child before it sees any code.

    `shown`: folders of toolchains outside the system's own, visible read-only in the new root.
    """

    plan: Plan
    shown: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    _pid_namespace: int = -1
    _null: int = -1
    _first_uid: int = 0
    _others: int | None = (
        None  # processes beside a child's own under its user id; None = RLIMIT_NPROC does not bite
    )
    _host_processes_visible: bool = field(default=True)

    def enter(self) -> None:
        """Namespaces and what all children share. In a plan with namespaces the caller goes on as process 1 of a new
        pid namespace, in a forked child; the process that called waits for it and exits with its status.

        Raises:
            OSError: the host refuses a step of this plan.
        """
        outer_uid = os.geteuid()
        self._null = os.open("/dev/null", os.O_RDWR)
        self._first_uid = _FIRST_JOB_UID + (os.getpid() & 0xFFFFF) * 64
        layers = ["process", "rlimits", "scratch", "caps"]
        if self.plan.namespaces:
            self._unshare()
            layers += ["pidns", "mountns", "netns", "ipcns"]
            layers += ["userns"] if self.plan.user_namespace else []
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        if self.plan.own_uid:
            layers += ["uid", "nproc"]
            self._others = 0
        elif self.plan.user_namespace and outer_uid != 0:
            layers.append("nproc")
            # The count is per user and namespace: the zygote, its parent and the sibling of a script check are in it.
            self._others = 4
        self._host_processes_visible = not self.plan.namespaces
        if self._seccomp_works():
            layers.append("seccomp")
        elif not self.plan.namespaces or self._others is None:
            raise OSError("neither namespaces nor seccomp: nothing would hold a program back")
        self.layers = tuple(layers)

    def _unshare(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(_UNSHARED | (linux.CLONE_NEWUSER if self.plan.user_namespace else 0))
        if self.plan.user_namespace:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/gid_map", f"{_INNER_ID} {gid} 1")
            _write("/proc/self/uid_map", f"{_INNER_ID} {uid} 1")
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials clears it
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _new_root(self.shown)
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        linux.unmount("/proc", linux.MNT_DETACH)
        linux.mount("none", "/", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID)

    def _seccomp_works(self) -> bool:
        try:
            self._filter()
        except OSError:
            return False
        return True

    def _filter(self) -> bytes:
        return linux.seccomp_program(
            own_pid=os.getpid() if self._host_processes_visible else None,
            may_fork=self._others is not None,
            # A scratch folder on the host is emptied file by file; without folders in it that cannot go wrong.
            may_make_directories=self.plan.namespaces,
        )

    def make_scratch(self) -> str | None:
        """A working folder on the host for one child, or None where `confine` mounts one. It lies in a folder of the
        zygote's, so that a child with a user id of its own can neither move it nor put anything in its place."""
        if self.plan.namespaces:
            return None
        parent = tempfile.mkdtemp(prefix="fewstep-sandbox-")
        os.chmod(parent, 0o711)
        scratch = os.path.join(parent, "work")
        os.mkdir(scratch, 0o700)
        return scratch

    def remove_scratch(self, scratch: str) -> None:
        """Removes what `make_scratch` made, whatever the program did to it: under the zygote's own user id it may have
        been moved, removed or replaced, its parent too. No link is followed."""
        parent = os.path.dirname(scratch)
        try:
            if not stat.S_ISDIR(os.lstat(parent).st_mode):
                os.unlink(parent)
                return
        except FileNotFoundError:
            return
        _open_up(parent)
        with os.scandir(parent) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for folder in folders:
            _open_up(folder)
        shutil.rmtree(parent)

    def fork(self) -> int:
        """os.fork into a pid namespace of the child's own, where the plan has them."""
        if self._pid_namespace >= 0:
            linux.setns(
                self._pid_namespace, linux.CLONE_NEWPID
            )  # undoes the previous unshare, which allows the next
            linux.unshare(linux.CLONE_NEWPID)
        return os.fork()

    def confine(self, connection: int, slot: int, cpu_seconds: int, caps: Caps, scratch: str | None) -> int:
        """Locks the calling child in.

        Args:
            connection: the only descriptor kept besides 0-2, which become /dev/null.
            slot: index among the children alive at once; selects the user id.
            cpu_seconds: RLIMIT_CPU.
            caps: this child's ceilings.
            scratch: what `make_scratch` gave.
        Returns:
            The connection's new descriptor, 3.
        Raises:
            OSError: a layer that `enter` promised cannot be had.
        """
        os.setsid()
        for number in (0, 1, 2):
            os.dup2(self._null, number)
        os.dup2(connection, 3)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        uid = self._first_uid + slot
        self._enter_scratch(uid, caps, scratch)
        for number in range(1, signal.NSIG):
            with suppress(OSError, ValueError):  # SIGKILL, SIGSTOP and the C library's own cannot be set
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full file is an OSError, not a death
        self._set_rlimits(cpu_seconds, caps)
        if self.plan.own_uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        linux.drop_capabilities()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.prctl(
            linux.PR_SET_DUMPABLE, 0
        )  # the program of the same check may not trace or read its checker
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if "seccomp" in self.layers:
            linux.install_seccomp(self._filter())
        return 3

    def _enter_scratch(self, uid: int, caps: Caps, scratch: str | None) -> None:
        if scratch is None:
            linux.unshare(linux.CLONE_NEWNS)
            owner = f",uid={uid},gid={uid}" if self.plan.own_uid else ""
            options = f"size={caps.scratch_bytes},nr_inodes=4096,mode=0700{owner}"
            linux.mount("none", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
            os.chdir("/tmp")
            return
        if self.plan.own_uid:
            os.chown(scratch, uid, uid)
        os.chdir(scratch)

    def _set_rlimits(self, cpu_seconds: int, caps: Caps) -> None:
        limits = {
            resource.RLIMIT_AS: caps.memory_bytes,
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_FSIZE: caps.scratch_bytes,
            resource.RLIMIT_NOFILE: caps.open_files,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        if self._others is not None:
            limits[resource.RLIMIT_NPROC] = caps.processes + self._others
        for which, value in limits.items():
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))


def _open_up(folder: str) -> None:
    """chmod 0700, of a folder and of nothing else."""
    # chmod itself follows links; this descriptor cannot stand for one.
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _new_root(shown: tuple[str, ...]) -> None:
    """Replaces the root folder by a tmpfs that holds the Python installation, the system libraries, the folders of
    `shown` and four devices.
    /proc is mounted too; the caller takes what it needs from it and unmounts it."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("none", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=0755")
    os.mkdir("/tmp/old")
    linux.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    os.mkdir("/proc")
    linux.mount("none", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    python = (os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix))
    for path in (*SYSTEM_PATHS, *python, *shown):
        _show(path, read_only=True)
    for path in _DEVICES:
        _show(path, read_only=False)
    linux.unmount("/old", linux.MNT_DETACH)
    os.rmdir("/old")


def _show(path: str, *, read_only: bool) -> None:
    """Binds the old root's `path` at the same place in the new root; what does not exist or is there stays so."""
    source = "/old" + path
    if os.path.lexists(path) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount(source, path, None, linux.MS_BIND | linux.MS_REC)
    if read_only:
        present = os.statvfs(path).f_flag
        # A user namespace may not clear flags the host set, so they are repeated.
        kept = sum(flag for bit, flag in _STATVFS_TO_MOUNT.items() if present & bit)
        linux.mount(
            "none", path, None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | kept
        )
