"""What DeepSpeed's ZeRO stages 2 and 3 ask of a trainer rank beyond `deepspeed.initialize`.

Stage 1 shards the optimiser's state over the ranks, stage 2 the gradients too, stage 3 the weights too. A *part* is what one
rank holds of a tensor: all of it up to stage 2; under stage 3 a flat run of ceil(elements / ranks), the last ones padded.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fewstep.actors.trainer_settings import TrainerSettings
from fewstep.kernels.model.checkpoint import own_shapes, read_state
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer, fresh_weights
from fewstep.platform.errors import CheckpointError

TAG = "trainer"
FILE = "trainer.json"
_REDUCE_ELEMENTS = 5 * 10**8  # DeepSpeed's own default
_GATHER_BYTES = 64 * 2**20


def deepspeed_config(settings: TrainerSettings, config: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a trainer."""
    sharding: dict[str, Any] = {"stage": settings.zero_stage}
    # Known by laying the model out without memory, which costs a moment for each layer.
    shapes = own_shapes(config) if settings.zero_stage >= 2 else {}
    if settings.zero_stage >= 2:
        # The buffer is allocated whole: DeepSpeed's default of 5e8 elements would be 2 GB for any model.
        sharding["reduce_bucket_size"] = min(_REDUCE_ELEMENTS, sum(map(math.prod, shapes.values())))
    if settings.zero_stage == 3:
        layer = _largest_layer(shapes)
        sharding |= {
            # Vectors stay whole on every rank: next to the matrices they take nothing, and to gather one costs as long.
            "stage3_param_persistence_threshold": max(
                math.prod(shape) for shape in shapes.values() if len(shape) <= 1
            ),
            # DeepSpeed's own limits, 1e9 elements, would leave a model of 1 B whole on every rank during a step.
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": layer,
            # A linear layer's own backward would keep the gathered weight alive. DeepSpeed's replaces
            # torch.nn.functional.linear for the whole process, so it has to be worth it.
            "memory_efficient_linear": settings.num_ranks > 1,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": sharding,
        "steps_per_print": 10**9,
    }


def partitioned_transformer(
    config: ModelConfig, initial: Path | int, options: Mapping[str, Any]
) -> Transformer:
    """A float32 transformer of which each rank holds its parts only, from a model folder or a seed (collective).

    Memory: the parts and one whole tensor at a time; a folder's files are mapped, 64 MiB at a time.

    Args:
        options: `deepspeed_config` of stage 3; the process group is there.
    """
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=dict(options)):
        transformer = Transformer(config)
    tensors = transformer.state_dict(keep_vars=True)
    weights = (
        fresh_weights(config, initial)
        if isinstance(initial, int)
        else read_state(initial, config, torch.float32)
    )
    with torch.no_grad():
        for name, whole in weights:
            _part(tensors[name]).copy_(part_of(tensors[name], whole))
    return transformer


def num_dims(parameter: torch.Tensor) -> int:
    """Dimensions of the whole tensor."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's parts of the module's state, by name; they share the module's memory."""
    return {name: _part(tensor).detach() for name, tensor in module.state_dict(keep_vars=True).items()}


def part_of(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, a value for the module's `tensor`; what is padding is 0."""
    if not hasattr(tensor, "ds_tensor"):
        return whole
    size = tensor.ds_tensor.numel()
    flat = whole.reshape(-1)[dist.get_rank() * size : (dist.get_rank() + 1) * size]
    return nn.functional.pad(flat, (0, size - len(flat)))


def gathered(module: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of parts such as `parts` gives, copied: on every rank up to stage 2; under stage 3 (collective) on
    rank 0 alone, {} on the others.

    Memory: rank 0 holds the result and 64 MiB, the other ranks the size of their share of 64 MiB.
    """
    tensors = module.state_dict(keep_vars=True)
    sharded = {name: part for name, part in values.items() if hasattr(tensors[name], "ds_tensor")}
    result = {name: part.clone() for name, part in values.items() if name not in sharded}
    if not sharded:
        return result
    for names in _buckets({name: part.numel() * part.element_size() for name, part in sharded.items()}):
        flat = torch.cat([sharded[name] for name in names])
        if dist.get_rank() != 0:
            dist.gather(flat, dst=0)
            continue
        received = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.gather(flat, received, dst=0)
        offset = 0
        for name in names:
            size, shape = len(sharded[name]), tensors[name].ds_shape
            whole = torch.cat([part[offset : offset + size] for part in received])
            result[name] = whole[: math.prod(shape)].reshape(shape).clone()
            offset += size
    return {name: result[name] for name in values} if dist.get_rank() == 0 else {}


def most(count: int) -> int:
    """The largest count of all ranks (collective)."""
    largest = torch.tensor(count)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@dataclass(frozen=True)
class SavedTrainer:
    """What a trainer's checkpoint says of itself: how it is cut, and optimiser steps behind it."""

    num_ranks: int
    zero_stage: int
    updates: int

    @classmethod
    def read(cls, folder: Path) -> SavedTrainer:
        """Raises CheckpointError."""
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                str(folder / FILE),
                f"unreadable ({error})",
                "what a finished checkpoint holds",
                "set resume=false to start over",
            ) from error

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))

    def fits(self, settings: TrainerSettings) -> bool:
        """Whether ranks of these settings read their shards as they are; without ZeRO there are none."""
        return self.zero_stage == 0 or self.num_ranks == settings.num_ranks


@contextlib.contextmanager
def universal_checkpoint(folder: Path) -> Iterator[Path]:
    """DeepSpeed's universal form of the checkpoint in `folder`, which any number of ranks can load (collective).

    Rank 0 converts it on the disk, parameter by parameter, into a folder beside it that is removed at the end.
    """
    target = _universal(folder)
    if dist.get_rank() == 0:
        from deepspeed.checkpoint.ds_to_universal import main as convert

        talk = io.StringIO()
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            # Checkpoints of stages 1 and 2 lack the mark that Megatron's writer leaves.
            convert(
                Namespace(
                    input_folder=str(folder / TAG), output_folder=str(target / TAG), num_extract_workers=1,
                    num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
                )
            )  # fmt: skip
    dist.barrier()
    try:
        yield target
        dist.barrier()  # not after an error, which the other ranks may not have: it would wait for them
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)


def _universal(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.universal")


def load_engine(engine: Any, folder: Path, saved: SavedTrainer, settings: TrainerSettings) -> None:
    """Weights and optimiser of a checkpoint into a DeepSpeed engine, whatever the number of ranks (collective)."""
    if dist.get_rank() == 0:
        shutil.rmtree(_universal(folder), ignore_errors=True)  # of a conversion that was killed
    if saved.fits(settings):
        # What an adapter is on is not in its checkpoint.
        engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=settings.lora is None)
        return
    decays = [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups]
    with universal_checkpoint(folder) as universal:
        engine._config.load_universal_checkpoint = True  # else it can be said at the engine's start only
        try:
            engine.load_checkpoint(str(universal), tag=TAG)
        finally:
            engine._config.load_universal_checkpoint = False
    # Under stage 3 DeepSpeed gives every group the first one's settings, and all of them one tensor that counts steps,
    # which every group would then advance.
    optimizer = engine.optimizer.optimizer
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


def _largest_layer(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of the largest layer, or of the embedding or head if that is larger."""
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        sizes[".".join(name.split(".")[:2])] += math.prod(shape)
    return max(sizes.values())


def _part(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "ds_tensor", tensor)


def _buckets(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, cut where the whole tensors would pass _GATHER_BYTES."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        size *= dist.get_world_size()
        if not groups or size > room:
            groups.append([])
            room = _GATHER_BYTES
        groups[-1].append(name)
        room -= size
    return groups
