"""A model whose layers are spread over ranks: rank 0's end, which an engine drives like any model, and the others' loop.

The engine, its scheduler and its pages know nothing of it. Before a forward rank 0 says how the rows lie and where their
keys and values go, and shares the embedded rows; each rank keeps keys and values of its own heads in pages of the same
numbers. Several models of one kind can be held side by side, by number: weights on trial beside those that serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from fewstep.actors.engine.cache import PackedAttention, PageStore, free_bytes
from fewstep.actors.engine.ranks import Ranks
from fewstep.actors.engine.rendezvous import Rendezvous
from fewstep.actors.engine.step_message import Layout, Reader, Writer, read_layout, write_layout
from fewstep.kernels.model.checkpoint import load_state, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.sharded import FollowingShard, LeadingShard
from fewstep.kernels.model.sharding import Shard, require_shardable
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.kernels.model.transformer import Attention
from fewstep.platform.errors import ActorDied, CheckpointError

_logger = logging.getLogger(__name__)

SERVING, TRIAL = 0, 1
_CPU = torch.device("cpu")


class _Order(IntEnum):
    STEP = 0
    WIPE = 1
    LOAD = 2
    ADOPT = 3
    DROP = 4
    END = 5


class StagedWeights(dict[str, torch.Tensor]):
    """Rank 0's part of weights that every other rank has a part of, too, under the number TRIAL."""


class ShardedTransformer(LeadingShard):
    """Rank 0's end of a sharded model.

    Args:
        whole: the model's configuration; number: what the other ranks know it by.
    """

    def __init__(self, whole: ModelConfig, ranks: Ranks, number: int = SERVING) -> None:
        super().__init__(whole, ranks.num_ranks, ranks.total)
        self.ranks, self.number = ranks, number
        self._groups: list[Any] | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Transformer.forward`, over a `PackedAttention`.

        Raises:
            ActorDied: names the rank that is gone, and its cause.
        """
        assert isinstance(attention, PackedAttention)
        attention.total = self.ranks.total
        attention.store.on_wipe = self._wipe
        with self.ranks.turn():
            self.ranks.order(self._step(positions, attention, rows))
            return super().forward(tokens, positions, attention, rows)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `Transformer.embed`; the other ranks, who have no embedding, are given the rows."""
        return self.ranks.share_rows(super().embed(tokens))

    def take_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Every rank takes its part of staged weights, between two forwards.

        Raises:
            CheckpointError: the weights are not staged on every rank, or are of another model.
        """
        if not isinstance(state, StagedWeights):
            raise CheckpointError(
                "weights", "tensors of one process", "weights staged on every rank", "load them from a folder"
            )
        self.check_weights(state)
        with self.ranks.turn():
            self.ranks.order(_numbers(_Order.ADOPT, self.number))
            super().take_weights(state)

    def _step(self, positions: torch.Tensor, attention: PackedAttention, rows: torch.Tensor | None) -> bytes:
        # The list of groups is the layout's identity: a forward that lies like the one before has the same list.
        same = attention.groups is self._groups
        self._groups = attention.groups
        writer = Writer()
        writer.number(_Order.STEP, self.number, int(same), attention.store.keys.shape[1])
        writer.array(rows)
        if not same:
            write_layout(writer, positions, attention)
        return writer.content()

    def _wipe(self, pages: list[int]) -> None:
        with self.ranks.turn():
            self.ranks.order(_numbers(_Order.WIPE, self.number, *pages))


@dataclass(frozen=True)
class Loaded:
    """A sharded model on all its ranks.

    Attributes:
        checksum: over the checksums of all parts; another number of ranks gives another one.
        free_bytes: memory that each rank could still take without any running out.
    """

    model: ShardedTransformer
    checksum: str
    free_bytes: int


def load_sharded(
    ranks: Ranks, folder: Path, dtype: torch.dtype | None = None, number: int = SERVING
) -> Loaded:
    """A model in eval mode, each rank's part read by that rank from the folder, which all their hosts have.

    No rank holds more than its part. The ranks serve forwards of other models meanwhile.

    Raises:
        ConfigError: the model cannot be dealt to so many ranks.
        CheckpointError: a file is missing, corrupt, or does not fit the others; names the rank that could not read it.
        ActorDied: a rank is gone.
    """
    config = ModelConfig.load(folder)
    require_shardable(config, ranks.num_ranks)
    load_tokenizer(folder, config)
    subject = f"load-{number}-{ranks.next_number()}"
    what = {
        "folder": str(Path(folder).resolve()),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "number": number,
        "subject": subject,
    }
    with ranks.turn():
        ranks.order(_numbers(_Order.LOAD) + json.dumps(what).encode())
    with torch.device("meta"):
        model = ShardedTransformer(config, ranks, number)
    try:
        state = load_state(folder, config, dtype, Shard(0, ranks.num_ranks))
        model.load_state_dict(state, assign=True)
    except Exception:
        with contextlib.suppress(ActorDied):
            ranks.reports(subject)  # a rank that is still reading would keep what it is told to drop
            drop(ranks, number)
        raise
    reports = [_report(ranks, state), *ranks.reports(subject)]
    for rank, report in enumerate(reports):
        if "error" in report:
            drop(ranks, number)
            raise CheckpointError(
                f"{folder} on rank {rank} of {ranks.num_ranks}", report["error"], "the whole folder on every host",
                "put it on storage that all hosts share",
            )  # fmt: skip
    digest = hashlib.blake2b("".join(report["checksum"] for report in reports).encode(), digest_size=16)
    return Loaded(model.eval(), digest.hexdigest(), _each_may_take(reports))


def staged(model: ShardedTransformer) -> StagedWeights:
    """The weights of a model loaded as TRIAL, for `Engine.load_weights` of the one that serves."""
    return StagedWeights(model.state_dict())


def drop(ranks: Ranks, number: int) -> None:
    """Let the other ranks forget a model."""
    with ranks.turn():
        ranks.order(_numbers(_Order.DROP, number))


def end(ranks: Ranks) -> None:
    """Send the other ranks home; those that are gone already are not missed."""
    with contextlib.suppress(ActorDied), ranks.turn():
        ranks.order(_numbers(_Order.END))


def follow(place: Rendezvous, rank: int) -> None:
    """Be a rank other than 0 until rank 0 ends it.

    Raises:
        ActorDied: another rank is gone.
    """
    ranks = Ranks(place, rank)
    try:
        _Follower(ranks).run()
    except ActorDied:
        ranks.end("")
        raise
    except Exception as error:
        _logger.exception("rank %d of %d failed", rank, place.num_ranks)
        ranks.end(f"{type(error).__name__}: {error}")
        raise
    finally:
        ranks.close()


@dataclass(eq=False)
class _Held:
    """A rank's part of one model, with its pages and the layout of the last forward."""

    model: FollowingShard
    dtype: torch.dtype
    store: PageStore | None = None
    layout: Layout | None = None


class _Follower:
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._models: dict[int, _Held] = {}

    @torch.inference_mode()
    def run(self) -> None:
        while True:
            content = self._ranks.obey()
            reader = Reader(content[: len(content) // 8 * 8])
            order = reader.number()
            if order == _Order.STEP:
                self._step(reader)
            elif order == _Order.WIPE:
                store = self._models[reader.number()].store
                assert store is not None
                store.wipe(reader.rest())
            elif order == _Order.LOAD:
                what = json.loads(content[8:])
                threading.Thread(target=self._load, args=(what,), name="fewstep-load", daemon=True).start()
            elif order == _Order.ADOPT:
                held, new = self._models[reader.number()], self._models.pop(TRIAL)
                held.model.load_state_dict(new.model.state_dict())
                held.model.pack()
            elif order == _Order.DROP:
                self._models.pop(reader.number(), None)
            else:
                return

    def _step(self, reader: Reader) -> None:
        held, same, num_pages = self._models[reader.number()], reader.number(), reader.number()
        rows = reader.array()
        if held.store is None or held.store.keys.shape[1] != num_pages:
            held.store = PageStore(held.model.config, num_pages, held.dtype, _CPU)
        if not same:
            held.layout = read_layout(reader, held.store)
        layout = held.layout
        assert layout is not None
        attention = PackedAttention(held.store, layout.groups, layout.destination, layout.stale)
        attention.total = self._ranks.total
        room = torch.empty((*layout.positions.shape, held.model.config.hidden_size), dtype=held.dtype)
        x = self._ranks.share_rows(room)
        held.model(x, layout.positions, attention, rows)

    def _load(self, what: dict[str, Any]) -> None:
        """On a thread of its own, so that forwards go on."""
        ranks = self._ranks
        try:
            folder, dtype = Path(what["folder"]), what["dtype"]
            config = ModelConfig.load(folder)
            with torch.device("meta"):
                model = FollowingShard(config, ranks.num_ranks, ranks.total)
            shard = Shard(ranks.rank, ranks.num_ranks)
            state = load_state(folder, config, None if dtype is None else getattr(torch, dtype), shard)
            model.load_state_dict(state, assign=True)
            model.eval().pack()
            dtypes = [tensor.dtype for name, tensor in state.items() if name.endswith("q_proj.weight")]
            self._models[what["number"]] = _Held(model, dtypes[0])
            report = _report(ranks, state)
        except Exception as error:  # rank 0 is waiting for an answer, whatever it is
            _logger.exception("rank %d could not load %s", ranks.rank, what["folder"])
            report = {"error": str(error) or type(error).__name__}
        ranks.report(what["subject"], report)


def _numbers(*values: int) -> bytes:
    writer = Writer()
    writer.number(*values)
    return writer.content()


def _report(ranks: Ranks, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {"checksum": state_checksum(state), "free_bytes": free_bytes(_CPU), "memory": ranks.address}


def _each_may_take(reports: list[dict[str, Any]]) -> int:
    """Ranks on one host share its memory."""
    sharing = Counter(str(report["memory"]) for report in reports)
    return min(int(report["free_bytes"]) // sharing[str(report["memory"])] for report in reports)
