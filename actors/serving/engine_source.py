"""What the engine's process is told: which engine to open, which weights to read. Free of torch where it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.actors.engine.rendezvous import Rendezvous
from fewstep.actors.serving.model_source import ModelSource
from fewstep.kernels.model.config import ComputeDtype

if TYPE_CHECKING:
    import torch

    from fewstep.actors.engine.engine import Engine
    from fewstep.platform.records import WeightVersion


@dataclass(frozen=True)
class EngineOptions:
    """How a replica's engine runs.

    Attributes:
        max_sequences: requests denoised together; more wait in the engine.
        dtype: to compute in; memory_bytes: for cached keys and values (see `Engine`), of all ranks together.
        num_ranks: processes that share each model; one_node: all on one, or wherever there is room.
        rank_deadline_s: a rank that has not answered within it is lost, and the replica with it.
        place: where the model's ranks meet, of which the engine's process becomes the first; None = it is not sharded.
        listener: descriptor of the socket at that place, in the engine's process.
    """

    max_sequences: int = 64
    dtype: ComputeDtype = "saved"
    memory_bytes: int | None = None
    num_ranks: int = 1
    one_node: bool = True
    rank_deadline_s: float = 60.0
    place: Rendezvous | None = None
    listener: int | None = None


@dataclass(frozen=True)
class EngineSource:
    """An engine over a model folder.

    Attributes:
        num_threads: of torch, in the process that opens it.
    """

    source: ModelSource
    options: EngineOptions
    num_threads: int

    def __call__(self) -> Engine:
        """Open it.

        Raises:
            CheckpointError: the folder is not a whole model.
        """
        import torch

        from fewstep.actors.serving.weights import open_engine

        torch.set_num_threads(self.num_threads)
        return open_engine(self.source, self.options)


@dataclass(frozen=True)
class NewWeights:
    """Another version's weights for a serving engine.

    Attributes:
        source: of the engine; address: of the version; folder: where it is; dtype: that the engine computes in.
    """

    source: ModelSource
    address: str
    folder: Path
    dtype: ComputeDtype

    def __call__(self, engine: Engine) -> tuple[Mapping[str, torch.Tensor], WeightVersion]:
        """Read and prove them (`weights.proved_weights`).

        Raises:
            CheckpointError: they cannot take the place of the engine's.
        """
        from fewstep.actors.serving.weights import proved_weights

        return proved_weights(engine, self.source, self.address, self.folder, self.dtype)
