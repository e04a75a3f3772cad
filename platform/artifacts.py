"""Files of a run: written whole or not at all, named by content, stamped with commit and machine."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.platform.errors import CheckpointError, ResourceError

_CHECKOUT = Path(__file__).resolve().parents[1]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write; it takes the place of `path` when the block ends without error.

    Missing parent folders are made. On any error the sibling is removed and `path` is as it was.

    Raises:
        ResourceError: the disk is full.
    """
    path = Path(path)
    temporary = _sibling(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _raise_if_disk_full(path, error)
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` with `data`, whole or not at all. Raises ResourceError when the disk is full."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, data: str) -> None:
    """Replaces `path` with UTF-8 text, whole or not at all. Raises ResourceError when the disk is full."""
    atomic_write_bytes(path, data.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary sibling folder; it takes the place of `path` when the block ends without error.

    An existing `path` changes places with the new folder in one step of the kernel's, so that a reader, or who comes
    after a kill, meets the old folder or the new one. Where the file system cannot exchange (NFS), there is a moment
    between two renames with neither. On any error the sibling is removed and `path` is as it was.

    Raises:
        ResourceError: the disk is full.
    """
    path = Path(path)
    temporary, old = _sibling(path, "tmp"), _sibling(path, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _swap_in(temporary, path, old)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _raise_if_disk_full(path, error)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes, in a folder and below, what `atomic_file` and `atomic_folder` were writing in processes that were killed.

    The folder is the caller's alone: a process of another host cannot be told from one that is gone.
    """
    for path in sorted(Path(folder).rglob(".*")):
        found = re.fullmatch(r"\..+\.(?:tmp|old)-(\d+)-[0-9a-f]{8}", path.name)
        if found is None or _runs(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weights' files of a model folder, in the order of their names; of one file, the file's own.

    Raises:
        CheckpointError: there are none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            str(folder), "no *.safetensors", "a model folder", "check the path, or write the model first"
        )
    digests = [file_digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def git_commit() -> str:
    """The commit of the checkout this package was imported from.

    `+dirty` is appended when tracked or new unignored files differ from it; `unknown` when the package is not
    a checkout, or git cannot tell.
    """
    # Only the checkout's own top level counts: an environment installed inside another repository is not it.
    top = _git("rev-parse", "--show-toplevel")
    head = _git("rev-parse", "HEAD")
    if not top or not head or Path(top).resolve() != _CHECKOUT:
        return "unknown"
    return head + ("+dirty" if _git("status", "--porcelain") else "")


def machine_info() -> dict[str, str | int]:
    """The machine in the words a report needs: cpu model, usable cores, memory in bytes, system, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _sibling(path: Path, kind: str) -> Path:
    # Same folder, hence the same file system: a rename between the two is atomic.
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(temporary: Path, path: Path, old: Path) -> None:
    if not path.is_dir():
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        shutil.rmtree(temporary)
    else:
        _swap_by_two_renames(temporary, path, old)


def _exchange(one: Path, two: Path) -> bool:
    """Swaps two names at once (Linux's renameat2 with RENAME_EXCHANGE); False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD: relative paths are of the working directory
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(two), 2) == 0


def _swap_by_two_renames(temporary: Path, path: Path, old: Path) -> None:
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _raise_if_disk_full(path: Path, error: BaseException) -> None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries written in Rust and C++ (safetensors, Arrow) pass the reason on as text only.
    if full or "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        raise ResourceError(
            str(path), "a full disk", "free space on that file system", "free some space or write elsewhere"
        ) from error


def _git(*arguments: str) -> str:
    # A hook of git exports GIT_DIR and friends, which would answer for another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments],
            capture_output=True, text=True, timeout=20, env=environment, stdin=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text().strip()
        total = min(total, int(text)) if text.isdigit() else total
    return total
