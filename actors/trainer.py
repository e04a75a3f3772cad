"""The driver's handle on all trainer ranks: one Ray actor each, around `TrainerRank`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.actors.deaths import first_death
from fewstep.actors.placement import on_node, require_room
from fewstep.actors.trainer_rank import LogprobSource, Metrics, TrainerRank
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.actors.zero import SavedTrainer
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows, save_samples
from fewstep.platform.errors import ActorDied, CheckpointError, UserError


class TrainerGroup:
    """The driver's handle on all ranks; needs a running Ray session.

    Args:
        node_id: the node of every rank; None = where Ray finds room.
        replay: file that keeps the batch where training had to be given up (`load_samples` reads it).

    Raises:
        ResourceError: the cluster has too few free CPUs; says how many are free.
        ActorDied: from any call, when a rank's process is gone; carries Ray's account of the cause.
    """

    def __init__(
        self,
        config: ModelConfig,
        initial: Path | int,
        settings: TrainerSettings,
        objective: str,
        options: Mapping[str, Any] | None = None,
        num_cpus: float = 1.0,
        node_id: str | None = None,
        replay: Path | None = None,
    ) -> None:
        import ray

        require_room("trainer ranks", settings.num_ranks, num_cpus)
        self._ray: Any = ray
        self.settings = settings
        self._replay, self._samples, self._num_skipped = replay, list[SampleRows](), 0
        actor: Any = ray.remote(num_cpus=num_cpus, max_restarts=0, **on_node(node_id))(TrainerRank)
        self._ranks: list[Any] = [
            actor.remote(config, initial, settings, objective, options or {})
            for _ in range(settings.num_ranks)
        ]
        try:
            address, port = self._get("start", [self._ranks[0].endpoint.remote()])[0]
            connected = [rank.connect.remote(index, address, port) for index, rank in enumerate(self._ranks)]
            self._get("connect", connected)
        except BaseException:
            self.close()
            raise

    def start_update(
        self, samples: Sequence[SampleRows], learning_rate: float, block_size: int | None = None
    ) -> list[Any]:
        """Begin one optimiser step and return its pending results, for `finish_update`."""
        self._samples = list(samples)
        shares = [samples[rank :: len(self._ranks)] for rank in range(len(self._ranks))]
        return [
            rank.update.remote(share, learning_rate, block_size)
            for rank, share in zip(self._ranks, shares, strict=True)
        ]

    def finish_update(self, pending: list[Any]) -> Metrics:
        """Metrics summed over ranks; `grad_norm` and `skipped` are of all of them already.

        Raises:
            UserError: `max_skipped_steps` were passed; the batch lies in the replay file.
        """
        parts: list[Metrics] = self._get("update", pending)
        total = {name: float(np.sum([part.get(name, 0.0) for part in parts])) for name in parts[0]}
        total |= {name: parts[0][name] for name in ("grad_norm", "skipped")}
        self._num_skipped = self._num_skipped + 1 if total["skipped"] else 0
        if self._num_skipped > self.settings.max_skipped_steps:
            raise self._diverged()
        return total

    def update(
        self, samples: Sequence[SampleRows], learning_rate: float, block_size: int | None = None
    ) -> Metrics:
        """One optimiser step, waited for."""
        return self.finish_update(self.start_update(samples, learning_rate, block_size))

    def logprobs(self, samples: Sequence[SampleRows], source: LogprobSource) -> list[NDArray[np.float32]]:
        """As TrainerRank's, each rank its share; in the order of the samples."""
        count = len(self._ranks)
        asked = list(samples) + list(samples[:1]) * (count - len(samples))  # every rank has something to do
        calls = [rank.logprobs.remote(asked[n::count], source) for n, rank in enumerate(self._ranks)]
        parts = self._get("logprobs", calls)
        results: list[Any] = [None] * len(asked)
        for index, part in enumerate(parts):
            results[index::count] = part
        return results[: len(samples)]

    def state(self) -> dict[str, torch.Tensor]:
        """Rank 0's published weights."""
        asked = self._ranks if self.settings.zero_stage == 3 else self._ranks[:1]
        return dict(self._get("state", [rank.state.remote() for rank in asked])[0])

    def adapter(self) -> dict[str, torch.Tensor]:
        """Rank 0's published adapter; empty where all weights are trained."""
        return dict(self._get("adapter", [self._ranks[0].adapter.remote()])[0])

    def save(self, folder: Path) -> None:
        self._get("save", [rank.save.remote(folder) for rank in self._ranks])

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, with as many ranks or another number.

        Raises:
            CheckpointError: it is damaged. The group is of no more use: other ranks may wait for the one that failed.
        """
        saved = SavedTrainer.read(folder)
        if saved.num_ranks != len(self._ranks):
            if self.settings.lora is not None and not saved.fits(self.settings):
                raise CheckpointError(
                    str(folder), f"an adapter's optimiser in the shards of {saved.num_ranks} ranks",
                    f"{saved.num_ranks} ranks", f"set trainer.num_ranks={saved.num_ranks}",
                )  # fmt: skip
            how = "read as it is" if saved.fits(self.settings) else "converted"
            print(f"checkpoint of {saved.num_ranks} trainer ranks, {how} for {len(self._ranks)}", flush=True)
        try:
            self._get("load", [rank.load.remote(folder) for rank in self._ranks])
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise cause from error
            first = next(iter(str(cause).splitlines()), "")
            raise CheckpointError(
                str(folder), f"unreadable ({type(cause).__name__}: {first})", "what a finished checkpoint holds",
                "set resume=false to start over",
            ) from error  # fmt: skip

    def matmul_rate(self) -> float:
        """FLOP/s that matrix products reach on all ranks together, rank 0's taken for each."""
        return len(self._ranks) * float(self._get("matmul rate", [self._ranks[0].matmul_rate.remote()])[0])

    def pids(self) -> list[int]:
        return list(self._get("pid", [rank.pid.remote() for rank in self._ranks]))

    def close(self) -> None:
        """End all ranks; they hold nothing that is not saved or published."""
        for rank in self._ranks:
            with contextlib.suppress(Exception):
                self._ray.kill(rank)

    def _diverged(self) -> UserError:
        kept = ""
        if self._replay is not None:
            save_samples(self._replay, self._samples)
            kept = f"; the last batch is kept in {self._replay}"
        return UserError(
            "gradient",
            f"not finite in {self._num_skipped} steps in a row, each skipped",
            f"at most {self.settings.max_skipped_steps} (trainer.max_skipped_steps)",
            f"lower learning_rate, or look at the data{kept}",
        )

    def _get(self, phase: str, references: list[Any]) -> list[Any]:
        try:
            return list(self._ray.get(references, timeout=self.settings.deadline_s))
        except self._ray.exceptions.GetTimeoutError as error:
            self.close()
            cause = f"{phase}: no answer within {self.settings.deadline_s:g} s"
            raise ActorDied("trainer rank", cause) from error
        except self._ray.exceptions.RayError as error:
            calls = {f"trainer rank {index}": rank.pid.remote() for index, rank in enumerate(self._ranks)}
            if (death := first_death(calls)) is None:
                raise
            raise ActorDied(death[0], f"{death[1]}; its last phase: {phase}") from error
