"""Who is compared with whom, in which mode; what a comparison needs on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.side_by_side.settings import Settings

from fewstep.platform.errors import ConfigError

Cache = Literal["none", "prefix", "dual", "exact"]
Kind = Literal["static", "threshold"]
Role = Literal["tokens", "loop", "autoregressive"]

ADAPTERS = Path(__file__).resolve().parent / "adapters"


@dataclass(frozen=True)
class Peer:
    """One engine beside ours.

    Attributes:
        name, title: for `--only`, and for readers.
        script: its adapter; environment, checkout: folders under `--peers`; the checkout may be None.
        format, our_format: the model folders it and we read, of one set of weights.
        caches, kinds: what its loop can do.
        batches: whether several prompts share a forward; if not they run one after another.
        needs: a further checkout, for the modelling file it loads with the weights.
        role: `tokens` are compared; of a `loop` only forwards per second; `autoregressive` is the yardstick of TPF.
    """

    name: str
    title: str
    script: str
    environment: str
    checkout: str | None
    format: str
    our_format: str
    caches: tuple[Cache, ...]
    kinds: tuple[Kind, ...]
    batches: bool
    needs: str | None = None
    role: Role = "tokens"


BOTH: tuple[Kind, ...] = ("static", "threshold")
PEERS = (
    Peer(
        "llada", "LLaDA generate.py", "llada_adapter.py", "venv-4", "LLaDA",
        "llada", "llada", ("none",), ("static",), batches=True, needs="Fast-dLLM",
    ),
    Peer(
        "fast_dllm", "Fast-dLLM v1", "fast_dllm_adapter.py", "venv-4", "Fast-dLLM",
        "llada", "llada", ("none", "prefix", "dual"), BOTH, batches=False,
    ),
    Peer(
        "dlmserve", "dlmserve over HTTP", "dlmserve_adapter.py", "venv-4", None,
        "llada", "llada", ("none",), ("static",), batches=True, needs="Fast-dLLM",
    ),
    Peer(
        "sdar", "SDAR generate.py", "sdar_adapter.py", "venv-4", "SDAR",
        "sdar", "sdar", ("exact",), BOTH, batches=False,
    ),
    Peer(
        "llada2", "dllm LLaDA2 sampler", "llada2_adapter.py", "venv-4", "dllm",
        "llada2", "sdar", ("none",), BOTH, batches=True,
    ),
    Peer(
        "diffusion_gemma", "transformers DiffusionGemma", "diffusion_gemma_adapter.py", "venv-5", None,
        "qwen3", "sdar", ("exact",), ("static",), batches=True, role="loop",
    ),
    Peer(
        "hf", "transformers generate, Qwen3", "hf_adapter.py", "venv-5", None,
        "qwen3", "sdar", ("exact",), ("static",), batches=True, role="autoregressive",
    ),
    Peer(
        "vllm", "vLLM CPU, Qwen3", "vllm_adapter.py", "venv-vllm", None,
        "qwen3", "sdar", ("exact",), ("static",), batches=True, role="autoregressive",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """One way to decode: our weights' format, cache class, policy, and prompts at once."""

    our_format: str
    cache: Cache
    kind: Kind
    streams: int

    @property
    def label(self) -> str:
        return f"{self.our_format} {self.cache} {self.kind} x{self.streams}"


@dataclass(frozen=True)
class Comparison:
    """The peers that do the same as we do in one mode; they and we take turns."""

    mode: Mode
    peers: tuple[Peer, ...]


def chosen_peers(only: Iterable[str]) -> tuple[Peer, ...]:
    """All peers, or those named.

    Raises:
        ConfigError: no peer has such a name.
    """
    names = list(only)
    known = [peer.name for peer in PEERS]
    for name in names:
        if name not in known:
            raise ConfigError("--only", name, ", ".join(known), "name one of these peers")
    return tuple(peer for peer in PEERS if not names or peer.name in names)


def comparisons(peers: Iterable[Peer], settings: Settings) -> list[Comparison]:
    """One for each mode that some peer has; the threshold schedule with one stream only."""
    members: dict[Mode, list[Peer]] = {}
    for streams in settings.streams:
        for kind in BOTH if streams == min(settings.streams) else BOTH[:1]:
            for peer in peers:
                if kind in peer.kinds:
                    for cache in peer.caches:
                        members.setdefault(Mode(peer.our_format, cache, kind, streams), []).append(peer)
    return [Comparison(mode, tuple(found)) for mode, found in members.items()]


def missing(peer: Peer, folder: Path) -> str | None:
    """Why a peer cannot run, in a line; None if all it needs is there."""
    python = folder / peer.environment / "bin" / "python"
    if not python.is_file():
        return f"no environment {peer.environment}"
    for name in (peer.checkout, peer.needs):
        if name is not None and not (folder / name).is_dir():
            return f"no checkout {name}"
    return None
