"""Whether trainer ranks could talk and build here: gloo's bandwidth, and DeepSpeed's compiled operators."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

from fewstep.platform.errors import ResourceError
from fewstep.platform.ports import address_towards, free_port

NUM_BYTES = 8 * 2**20
_REPEATS = 4
_TIMEOUT = timedelta(seconds=60)


class GlooProbe:
    """One rank of an all-reduce; an actor on each of two nodes, or a process."""

    def endpoint(self, towards: str = "127.0.0.1") -> tuple[str, int]:
        """This host's address on the way to another, and a free port there."""
        address = address_towards(towards, 9)
        return address, free_port(address, 0)

    def measure(self, rank: int, address: str, port: int) -> float:
        """Bytes per second of an all-reduce of NUM_BYTES between two ranks, the fastest of a few.

        Raises:
            ResourceError: the other rank was not reached, or left.
        """
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        with _gloo_address(address if rank == 0 else self.endpoint(address)[0]):
            try:
                dist.init_process_group(
                    "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=_TIMEOUT
                )
                payload = torch.ones(NUM_BYTES // 4)
                dist.all_reduce(payload)  # connects
                fastest = min(_timed(lambda: dist.all_reduce(payload)) for _ in range(_REPEATS))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ResourceError(
                    f"gloo {address}:{port}",
                    reason,
                    "two ranks that reach each other",
                    "open the ports between the hosts",
                ) from error
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        return NUM_BYTES / fastest


def local_gloo_bytes_per_s() -> float:
    """Between two processes of this host. Raises ResourceError."""
    address, port = GlooProbe().endpoint()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(GlooProbe().measure, rank, address, port) for rank in range(2)]
        return min(rank.result() for rank in ranks)


def build_deepspeed_ops() -> float:
    """Seconds to compile and load the operator that DeepSpeed's CPU ranks exchange gradients with; 0 s when it is there.

    Raises:
        ResourceError: no compiler, or the build failed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = time.monotonic()
    try:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)
    except Exception as error:  # a build ends in whatever its tools raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ResourceError(
            "DeepSpeed",
            f"a build that failed ({reason})",
            "a C++ compiler and ninja",
            "install g++ and python headers",
        ) from error
    return time.monotonic() - started


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextlib.contextmanager
def _gloo_address(address: str) -> Iterator[None]:
    """gloo listens on the address its host name resolves to, which may be another network's; so it is named."""
    import psutil

    names = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if any(entry.address == address for entry in entries)
    ]
    old = os.environ.get("GLOO_SOCKET_IFNAME")
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    try:
        yield
    finally:
        if old is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = old
