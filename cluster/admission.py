"""Who may reach a server at all, and how it ends without dropping what it has accepted."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fewstep.platform.errors import ConfigError

_ASK_S = 0.2
_ANSWER_S = 5.0


def check_access(host: str, keys: Path | None) -> None:
    """Raise a ConfigError unless `host` is loopback or a file with at least one key is given; for no host, too."""
    from fewstep.actors.serving.keys import read_keys

    if keys is not None:
        if not read_keys(keys):
            raise ConfigError(str(keys), "no keys", "at least one key", "make one with `fewstep key NAME`")
    elif not _is_loopback(host):
        raise ConfigError(
            "host", f"{host} without keys", "a loopback address, or keys",
            "make a key with `fewstep key NAME` and set keys=keys.json",
        )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        entries = socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError("host", f"{host}: {error.strerror or error}", "an address", "correct it") from error
    addresses = {str(entry[4][0]).partition("%")[0] for entry in entries}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


@contextmanager
def ending() -> Iterator[threading.Event]:
    """An event that the first SIGTERM sets; a second one ends the process as it otherwise would."""
    stop = threading.Event()

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        stop.set()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def drain(seconds: float) -> int:
    """Have every replica refuse what is new, and wait until it has answered the rest; how many requests are left."""
    from ray import serve

    from fewstep.actors.serving.replica import APPLICATION

    deadline, left = time.monotonic() + seconds, 0
    handle = serve.get_app_handle(APPLICATION)
    while True:
        try:
            answers = handle.broadcast("drain").results(timeout_s=_ANSWER_S, return_exceptions=True)
        except TimeoutError:
            answers = [TimeoutError()]
        # One that has died in the meantime has nothing left to finish; one that is late has, as far as anybody knows.
        late = sum(isinstance(answer, TimeoutError) for answer in answers)
        left = late + sum(int(answer) for answer in answers if not isinstance(answer, Exception))
        if left == 0 or time.monotonic() > deadline:
            return left
        time.sleep(_ASK_S)
