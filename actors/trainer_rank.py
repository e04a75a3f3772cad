"""One trainer rank: a DeepSpeed engine over the shared transformer, its optimiser and its moving average.

A plain class (usable in one process for debugging); `actors/trainer.py` runs it as Ray actors. The loss is an *objective*
plug-in, named by a dotted path, so this floor knows no job:

    objective.loss(logprob [m], entropy [m], rows: RowTensors) -> (scalar loss, metrics)
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fewstep.actors import zero
from fewstep.actors.listening_store import listening_store
from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.flops import matmul_rate, training_flops
from fewstep.kernels.model.lora import Lora
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import RowBatch, SampleRows
from fewstep.platform.registry import resolve

Metrics = dict[str, float]
LogprobSource = Literal["current", "reference"]

_AVERAGE = "average.safetensors"
_HOST = "127.0.0.1"


class Objective(Protocol):
    """What a training update minimises; weights in `rows` are already normalised over the whole batch."""

    def loss(
        self, logprob: torch.Tensor, entropy: torch.Tensor, rows: RowTensors
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]: ...


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that can be told to leave everything as it is: moments, count of steps and weights.

    Attributes:
        skip: the next steps do nothing.
    """

    skip = False

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)


class TrainerRank:
    """One rank: a DeepSpeed engine, its optimiser and the optional moving average.

    Args:
        config: the model's sizes.
        initial: a model folder to start from, or an integer seed for fresh weights.
        settings: see TrainerSettings.
        objective: dotted path of an Objective factory, called with `options`.
    """

    def __init__(
        self,
        config: ModelConfig,
        initial: Path | int,
        settings: TrainerSettings,
        objective: str,
        options: Mapping[str, Any],
    ) -> None:
        torch.set_num_threads(1)
        self._settings, self._config = settings, config
        self._objective: Objective = resolve("objective", objective, {})(**options)
        self._initial = initial
        self._reference: TrainingModel | None = None
        self._rank = self._updates = 0
        self._store: Any = None

    def connect(self, rank: int, address: str, port: int) -> None:
        """Join the process group, load the weights and build the DeepSpeed engine; every rank must call it at the same
        time."""
        settings, self._rank = self._settings, rank
        ranks = {
            "LOCAL_RANK": rank,
            "LOCAL_SIZE": settings.num_ranks,
            "RANK": rank,
            "WORLD_SIZE": settings.num_ranks,
        }
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # The shared-memory collective is compiled on first use (80 s, and a killed compile leaves a lock that hangs
        # every later start); gloo's own all-reduce is as fast at these sizes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            store = self._store or TCPStore(address, port, wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.num_ranks)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        transformer = self._transformer()
        transformer.gradient_checkpointing = settings.gradient_checkpointing
        self._lora = None if settings.lora is None else Lora(self._config, settings.lora)
        if self._lora is not None:
            self._lora.attach(transformer)
        self._model = TrainingModel(transformer.train(), settings.precision, settings.compiled, self._lora)
        # This rank's parts of the average; up to stage 2 that is all of it.
        self._ema = {n: p.clone() for n, p in self._trained().items()} if settings.ema_decay else None
        self._optimizer = SkippingAdamW(
            _decay_groups(self._model, settings.weight_decay), lr=0.0, betas=settings.betas, fused=True
        )
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            optimizer=self._optimizer,
            config=zero.deepspeed_config(settings, self._config),
        )

    def update(
        self, samples: Sequence[SampleRows], learning_rate: float, block_size: int | None = None
    ) -> Metrics:
        """One optimiser step on this rank's share of a batch.

        Args:
            samples: rows whose weights are normalised over the batch of all ranks.
            block_size: override of the model's own (the warm-up over block sizes).
        Returns:
            the objective's metrics summed over this rank's targets, `loss`, `grad_norm` (of all ranks together, before
            clipping), `rows`, `targets`, `flops`, and `skipped`: 1 if the gradient was not finite, so that nothing was changed.
        """
        if self._config.logit_shift and any((s.targets[s.positions == 0] >= 0).any() for s in samples):
            raise ValueError("position 0 is a target, and in a model with shifted logits no row predicts it")
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        totals: Metrics = {"loss": 0.0, "rows": 0.0, "targets": 0.0, "flops": 0.0}
        if self._config.attention_kind == "bidirectional":
            samples = [sample.states_only() for sample in samples]
        batches, num_own = self._rounds(samples)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            engine.set_gradient_accumulation_boundary(last)
            rows = RowTensors.of(batch)
            if self._lora is not None:
                self._lora.draw(self._updates, self._rank, index)
            logprob, entropy = engine(
                rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets,
                block_size or self._config.sees_block, rows.documents,
            )  # fmt: skip
            if index >= num_own:
                engine.backward(logprob[:0].sum())
                engine.step()
                continue
            loss, metrics = self._objective.loss(logprob, entropy, rows)
            # Gradients are averaged over ranks, weights are normalised over all of them: undo the division.
            engine.backward(loss * self._settings.num_ranks)
            if last and self._settings.zero_stage == 0:
                totals["grad_norm"] = self._grad_norm()
                self._optimizer.skip = not math.isfinite(totals["grad_norm"])
            engine.step()
            totals["loss"] += float(loss.detach())
            totals["rows"] += batch.num_rows
            totals["targets"] += len(rows.targets)
            totals["flops"] += training_flops(
                self._config, batch.num_rows, len(rows.targets), batch.num_pairs, self._lora is not None
            )
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        # ZeRO's optimiser keeps the gradients, skips by itself, and says -1 or inf for NaN.
        if self._settings.zero_stage > 0:
            norm = float(engine.get_global_grad_norm())
            totals["grad_norm"] = norm if norm >= 0 else math.nan
        totals["skipped"] = float(not math.isfinite(totals["grad_norm"]))
        if totals["skipped"]:
            return totals
        self._updates += 1
        self._average()
        return totals

    def _rounds(self, samples: Sequence[SampleRows]) -> tuple[list[RowBatch], int]:
        """The micro-batches of a step, and how many of them count.

        From stage 2 on every backward is an exchange of all ranks: one with fewer batches takes part with its shortest
        sample, which adds nothing.
        """
        batches = _micro_batches(samples, self._settings.micro_rows)
        num_own = len(batches)
        if self._settings.zero_stage >= 2 and (missing := zero.most(num_own) - num_own):
            batches += [RowBatch.collate([min(samples, key=lambda sample: len(sample.tokens))])] * missing
        return batches, num_own

    def logprobs(self, samples: Sequence[SampleRows], source: LogprobSource) -> list[NDArray[np.float32]]:
        """Log-probabilities of the targets under the weights as they are, or under those training started from.

        The second model is read from the start when it is first asked for, and kept; of a model with an adapter it is the
        same one without it.

        Returns:
            float32 [R_sample] a sample, 0 where a row has no target.
        """
        bidirectional = self._config.attention_kind == "bidirectional"
        shown = [sample.states_only() if bidirectional else sample for sample in samples]
        results = [np.zeros(len(sample.tokens), np.float32) for sample in samples]
        groups = _grouped([len(sample.tokens) for sample in shown], self._settings.micro_rows)
        # Under stage 3 a forward gathers weights from all ranks: one with fewer groups goes through its first again.
        rounds = zero.most(len(groups)) if self._settings.zero_stage == 3 else len(groups)
        for group in groups + groups[:1] * (rounds - len(groups)):
            rows = RowTensors.of(RowBatch.collate([shown[index] for index in group]))
            with self._asked(source) as model:
                values, _ = model(
                    rows.tokens, rows.positions, rows.copies, rows.target_rows, rows.targets,
                    self._config.sees_block, rows.documents,
                )  # fmt: skip
            flat = np.zeros(rows.tokens.numel(), np.float32)
            flat[rows.target_rows.numpy()] = values.float().numpy()
            for index, own in zip(group, flat.reshape(tuple(rows.tokens.shape)), strict=True):
                # States come last, so what a bidirectional model is not shown is the beginning.
                size = len(shown[index].tokens)
                results[index][len(results[index]) - size :] = own[:size]
        return results

    def state(self) -> dict[str, torch.Tensor]:
        """The weights to publish (the moving average if one is kept). Under ZeRO 3 all ranks call it, rank 0 gets the
        weights and the others {}: none but rank 0 ever holds them whole."""
        transformer = self._model.transformer
        if self._lora is not None:
            return self._lora.merged(transformer.state_dict(), self.adapter())
        return zero.gathered(transformer, self._published())

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter in the weights to publish (`kernels.model.lora.Factors`); empty where all weights are trained."""
        if self._lora is None:
            return {}
        return {name: tensor.clone() for name, tensor in self._published().items()}

    def save(self, folder: Path) -> None:
        """Write engine, optimiser and average below `folder` (collective: all ranks call it)."""
        self._engine.save_checkpoint(
            str(folder), tag=zero.TAG, exclude_frozen_parameters=self._lora is not None
        )
        # Whole, so that any number of ranks can read it.
        average = self._ema or {}
        if self._lora is None:
            average = zero.gathered(self._model.transformer, average)
        if self._rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in average.items()}, folder / _AVERAGE)
            settings = self._settings
            zero.SavedTrainer(settings.num_ranks, settings.zero_stage, self._updates).write(folder)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote (collective); the number of ranks that wrote it may have been another."""
        saved = zero.SavedTrainer.read(folder)
        zero.load_engine(self._engine, folder, saved, self._settings)
        self._updates = saved.updates
        if self._ema is None:
            return
        tensors = self._model.transformer.state_dict(keep_vars=True)
        with safe_open(folder / _AVERAGE, "pt") as file:
            for name, average in self._ema.items():
                whole = file.get_tensor(name)
                average.copy_(whole if self._lora is not None else zero.part_of(tensors[name], whole))

    def endpoint(self) -> tuple[str, int]:
        """Where this process, to be rank 0, listens for the others; a loopback address."""
        self._store, port = listening_store(_HOST)
        return _HOST, port

    def matmul_rate(self) -> float:
        """FLOP/s of this process's matrix products in the precision of training."""
        return matmul_rate(torch.bfloat16 if self._settings.precision == "bf16" else torch.float32)

    def pid(self) -> int:
        return os.getpid()

    def _grad_norm(self) -> float:
        """Norm of the gradient averaged over ranks, before clipping; called at the boundary, before the step."""
        norms = [p.grad.norm() for p in self._model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    def _average(self) -> None:
        if self._ema is None or self._settings.ema_decay is None:
            return
        # Early on the average must forget the initial weights: (1 + n) / (10 + n) is the usual warm-up.
        decay = min(self._settings.ema_decay, (1 + self._updates) / (10 + self._updates))
        with torch.no_grad():
            for name, part in self._trained().items():
                self._ema[name].lerp_(part, 1 - decay)

    def _trained(self) -> dict[str, torch.Tensor]:
        """What training changes, this rank's parts of it, in the parameters' own memory."""
        return zero.parts(self._model.transformer) if self._lora is None else self._lora.factors()

    def _published(self) -> dict[str, torch.Tensor]:
        return self._trained() if self._ema is None else self._ema

    @contextmanager
    def _asked(self, source: LogprobSource) -> Iterator[TrainingModel]:
        """The model that a question is for, without gradient and dropout; the reference of an adapter is what it is on."""
        own, lora = self._model, self._lora
        if source == "reference" and self._reference is None:
            self._reference = self._frozen()
        asked = own if source == "current" or self._reference is None else self._reference
        own.eval()
        try:
            with torch.no_grad(), lora.detached() if lora is not None and asked is not own else nullcontext():
                yield asked
        finally:
            own.train()

    def _transformer(self) -> Transformer:
        """The weights that training starts from, float32."""
        if self._settings.zero_stage == 3:
            options = zero.deepspeed_config(self._settings, self._config)
            return zero.partitioned_transformer(self._config, self._initial, options)
        if isinstance(self._initial, int):
            transformer = Transformer(self._config)
            transformer.initialise(self._initial)
            return transformer
        return load_model(self._initial, torch.float32)[0]

    def _frozen(self) -> TrainingModel:
        """The weights that training started from, sharded as the trained ones are; under an adapter they are its base."""
        if self._lora is not None:
            return TrainingModel(self._model.transformer.requires_grad_(False), self._settings.precision)
        model = TrainingModel(self._transformer().eval().requires_grad_(False), self._settings.precision)
        if self._settings.zero_stage < 3:
            return model
        import deepspeed

        # Without an optimiser an engine only gathers for the forward.
        engine, *_ = deepspeed.initialize(
            model=model, config=zero.deepspeed_config(self._settings, self._config)
        )
        return engine.module  # type: ignore[no-any-return]


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if zero.num_dims(p) > 1]
    vectors = [p for p in trained if zero.num_dims(p) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # An adapter is matrices only, and DeepSpeed cannot shard a group of nothing.
    return [group for group in groups if group["params"]]


def _grouped(sizes: Sequence[int], micro_rows: int) -> list[list[int]]:
    """Indices sorted by size and cut where the padded size would pass `micro_rows`."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
        if groups[-1] and (len(groups[-1]) + 1) * sizes[index] > micro_rows:
            groups.append([])
        groups[-1].append(index)
    return groups


def _micro_batches(samples: Sequence[SampleRows], micro_rows: int) -> list[RowBatch]:
    """Samples of about equal length together."""
    groups = _grouped([len(sample.tokens) for sample in samples], micro_rows)
    return [RowBatch.collate([samples[index] for index in group]) for group in groups]
