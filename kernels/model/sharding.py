"""Tensor parallelism on paper: which part of which tensor a rank holds, and which models can be split. Free of torch.

Megatron-LM's split (Shoeybi et al., 1909.08053, section 3): queries, keys, values, gate and up by output rows, so that a rank
has whole heads and whole inner columns; attention's and the MLP's output by input columns, so that a rank's products are
summands, added up once after each of the two.

Embedding, final norm and head are rank 0's alone. The other ranks are sent the embedded rows, as many numbers as one of
the 2 L sums of a forward of L layers has, and in return none of them holds the 2 · V · d numbers of an untied vocabulary
(SDAR-8B, bfloat16: 2.5 of 16.4 GB).
"""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import ConfigError

# The axis that is split; an expert's tensors are stacked, so theirs lies one further back.
_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `num_ranks`."""

    rank: int
    num_ranks: int

    @property
    def leads(self) -> bool:
        """Whether this is the rank with embedding and head."""
        return self.rank == 0


WHOLE = Shard(0, 1)


def require_shardable(config: ModelConfig, num_ranks: int) -> None:
    """Refuse a number of ranks that the model's heads or inner columns cannot be dealt to evenly.

    Raises:
        ConfigError: names the size that is in the way, and the numbers it allows.
    """
    for name, size in _split_sizes(config).items():
        if size % num_ranks:
            fitting = [n for n in range(1, size + 1) if not any(s % n for s in _split_sizes(config).values())]
            raise ConfigError(
                "tensor_parallel",
                f"{num_ranks}, which does not divide the model's {name} of {size}",
                f"{', '.join(map(str, fitting))} for this model",
                "choose one of these",
            )


def shard_config(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The configuration of one rank's layers: its own heads and inner columns, everything else as it is.

    Raises:
        ConfigError: as `require_shardable`.
    """
    require_shardable(config, num_ranks)
    parts: dict[str, object] = {
        name: getattr(config, name) // num_ranks
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    if config.moe is not None:
        inner = config.moe.moe_intermediate_size // num_ranks
        parts["moe"] = config.moe.model_copy(update={"moe_intermediate_size": inner})
    return config.model_copy(update=parts)


def held_by(name: str, shard: Shard) -> bool:
    """Whether a rank has any of a tensor."""
    return shard.leads or name.startswith("layers.")


def split_axis(name: str) -> int | None:
    """The axis along which a tensor of `Transformer.state_dict()` is dealt to the ranks; None = each has all of it."""
    module, _, kind = name.rpartition(".")
    if module.endswith(".experts"):
        return {"gate_proj": 1, "up_proj": 1, "down_proj": 2}[kind]
    last = module.rpartition(".")[2]
    if last in _ROWS:
        return 0
    return 1 if last in _COLUMNS and kind == "weight" else None


def is_summand_bias(name: str) -> bool:
    """Whether a tensor is added to a sum over ranks: rank 0 adds it, the others hold zeros in its place."""
    module, _, kind = name.rpartition(".")
    return kind == "bias" and module.rpartition(".")[2] in _COLUMNS


def part_of(name: str, shape: tuple[int, ...], shard: Shard) -> tuple[slice, ...]:
    """What a rank holds of a tensor of the whole model's shape, as an index into it."""
    axis = split_axis(name)
    if axis is None or shard == WHOLE:
        return (slice(None),) * len(shape)
    size = shape[axis] // shard.num_ranks
    own = slice(shard.rank * size, (shard.rank + 1) * size)
    return tuple(own if index == axis else slice(None) for index in range(len(shape)))


def part_shape(name: str, shape: tuple[int, ...], shard: Shard) -> tuple[int, ...]:
    """Of `part_of`."""
    part = part_of(name, shape, shard)
    return tuple(len(range(*own.indices(size))) for own, size in zip(part, shape, strict=True))


def _split_sizes(config: ModelConfig) -> dict[str, int]:
    sizes = {"num_key_value_heads": config.num_key_value_heads}  # which divides the number of heads
    if config.moe is not None:
        sizes["moe_intermediate_size"] = config.moe.moe_intermediate_size
    if config.moe is None or config.moe.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    return sizes
