"""Free ports of this host, and its own address on the way to another."""

from __future__ import annotations

import errno
import socket

from fewstep.platform.errors import ResourceError


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, a free one for 0.

    Raises:
        ResourceError: it is taken, forbidden, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are still in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            got, allowed, fix = (
                "a port in use",
                "a free port",
                "stop what uses it or set another port (0 = any)",
            )
        elif error.errno == errno.EACCES:
            got, allowed, fix = "a port this user may not open", "a port from 1024 on", "set another port"
        else:
            got, allowed, fix = f"{error.strerror or error}", "an address of this machine", "correct the host"
        raise ResourceError(f"{host}:{port}", got, allowed, fix) from error


def address_towards(host: str, port: int) -> str:
    """This host's own address on the way to another; nothing is sent. Raises OSError: there is no way, or no such host."""
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket only learns the route here
        return str(probe.getsockname()[0])
