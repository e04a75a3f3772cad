"""Model folders in Hugging Face layout: config.json, safetensors, tokenizer.json, of any family."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families import Piece, family_of
from fewstep.kernels.model.families.names import ROUTER_BIAS
from fewstep.kernels.model.sharding import (
    WHOLE,
    Shard,
    held_by,
    is_summand_bias,
    part_of,
    part_shape,
    require_shardable,
)
from fewstep.kernels.model.shards import INDEX_FILE, ShardedTensors, write_shards
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.errors import CheckpointError
from fewstep.platform.rng import generator

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


_WORD_KEYS = generator("state-checksum").integers(0, 2**63, 1 << 15, dtype=np.uint64) | np.uint64(1)


def embedded_model() -> Path:
    """The folder of the model shipped with the package."""
    return Path(__file__).resolve().parent / "embedded"


def state_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """A digest over names, shapes and bytes, in name order; equal weights give equal checksums anywhere.

    Proof against accidents, not against forgers. Runs of 2^15 words of 64 bits go in as Σ word · key mod 2^64: an odd key
    has an inverse, so no single word can change unseen, and keys that differ see words that change places. It reads 7 GB
    a second where blake2b over the bytes reads 0.9, and every push has two of them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{array.dtype}:{tuple(array.shape)}".encode())
        if array.numel():
            raw = array.reshape(-1).view(torch.uint8).numpy()
            words = raw[: len(raw) // 8 * 8].view(np.uint64)
            whole = len(words) // len(_WORD_KEYS) * len(_WORD_KEYS)
            digest.update((words[:whole].reshape(-1, len(_WORD_KEYS)) @ _WORD_KEYS).tobytes())
            digest.update((words[whole:] @ _WORD_KEYS[: len(words) - whole]).tobytes())
            digest.update(raw[len(words) * 8 :].tobytes())
    return digest.hexdigest()


def load_state(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None = None, shard: Shard = WHOLE
) -> dict[str, torch.Tensor]:
    """The weights of a folder under the transformer's names; names and shapes are checked before any is read.

    Memory: one copy of the weights and at most 64 MiB of a mapped file. Tensors go from the file to their place in one
    step: temporary ones between them would fragment the heap by a sixth of the weights. Of a shard that is one copy of its
    part: tensors are views of a mapped file, of which only what is copied is read.

    Args:
        config: of the whole model.
        dtype: to convert each tensor to as it is read; None = as stored.
        shard: load the part of this rank only (see `sharding`).
    Raises:
        CheckpointError: names the missing, surplus, or wrongly shaped tensors as the files spell them.
    """
    return dict(read_state(folder, config, dtype, shard))


def read_state(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None = None, shard: Shard = WHOLE
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `load_state`, one tensor of the transformer at a time, each as soon as all of it is read: for whoever keeps a
    part of each only."""
    files = ShardedTensors(folder)
    pieces = _checked_pieces(files, config)
    pieces = {name: [part for part in parts if held_by(part.target, shard)] for name, parts in pieces.items()}
    left = Counter(piece.target for parts in pieces.values() for piece in parts)
    state: dict[str, torch.Tensor] = {}
    shapes = own_shapes(config)
    for name, tensor in files.read({name for name, parts in pieces.items() if parts}):
        for piece in pieces[name]:
            wanted = tensor.dtype if dtype is None or piece.target.endswith(ROUTER_BIAS) else dtype
            _place(state, piece, tensor, wanted, shapes[piece.target], files.where, shard)
            left[piece.target] -= 1
            if not left[piece.target]:
                yield piece.target, state.pop(piece.target)


def check_weights(folder: Path, config: ModelConfig) -> ShardedTensors:
    """The headers of a folder's weights, names and shapes checked; no tensor is read.

    Raises:
        CheckpointError: as `load_state`.
    """
    files = ShardedTensors(folder)
    _checked_pieces(files, config)
    return files


def load_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """A model in eval mode and its tokenizer.

    The module is built without memory and each tensor becomes its parameter, so there is never a second copy.

    Args:
        dtype: of the weights; None = as stored.
    Raises:
        CheckpointError: a file is missing, corrupt, or does not fit the others.
    """
    config = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, config)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(load_state(folder, config, dtype), assign=True)
    return model.eval(), tokenizer


def save_model(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    source: Path | None = None,
) -> None:
    """Write a model folder in its family's format, whole or not at all; an older one of that name is replaced.

    Weights are stored in the type that config.json states. What was loaded and not changed comes back byte for byte.

    Args:
        source: the folder the model came from; its split into shards and its other files (chat template, generation
            settings, modelling code) are kept. It may be `folder` itself.
    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    files = ShardedTensors(source) if source is not None and config.source is not None else None
    try:
        with atomic_folder(Path(folder)) as temporary:
            _write_weights(temporary, state, config, files)
            if source is not None:
                _copy_other_files(Path(source), temporary)
            (temporary / "config.json").write_text(config.dump())
            _write_tokenizer(temporary / "tokenizer.json", tokenizer)
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes its file readable by the owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(folder), str(error), "a writable folder", "check its permissions"
        ) from error


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, without its memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def rank_parameters(config: ModelConfig, num_ranks: int, rank: int) -> int:
    """Parameters that one of several ranks holds.

    Raises:
        ConfigError: the model cannot be dealt to so many ranks.
    """
    require_shardable(config, num_ranks)
    shard = Shard(rank, num_ranks)
    return sum(
        prod(part_shape(name, shape, shard))
        for name, shape in own_shapes(config).items()
        if held_by(name, shard)
    )


def _pieces_by_source(config: ModelConfig) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for piece in family_of(config).pieces(config):
        pieces.setdefault(piece.source, []).append(piece)
    return pieces


def _checked_pieces(files: ShardedTensors, config: ModelConfig) -> dict[str, list[Piece]]:
    pieces = _pieces_by_source(config)
    head = family_of(config).head_name
    if config.tie_word_embeddings and head in files.entries:
        pieces[head] = [Piece(head, "embed_tokens.weight")]
    missing, surplus = (
        sorted(pieces.keys() - files.entries.keys()),
        sorted(files.entries.keys() - pieces.keys()),
    )
    if missing or surplus:
        raise CheckpointError(
            files.where,
            f"missing {_some(missing)}, surplus {_some(surplus)}",
            "the tensors of config.json",
            "re-export the model",
        )
    shapes = own_shapes(config)
    for name, parts in pieces.items():
        expected, got = source_shape(parts, shapes), files.entries[name].shape
        if got != expected:
            raise CheckpointError(
                f"{files.folder / files.entries[name].file}:{name}",
                got,
                f"shape {expected}",
                "use the config.json of these weights",
            )
    return pieces


def _some(names: list[str]) -> str:
    return f"{names[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def source_shape(parts: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a tensor of the files, from its pieces and the shapes of `own_shapes`."""
    inner = [shapes[part.target][0 if part.index is None else 1 :] for part in parts]
    if parts[0].first_row is None:
        return inner[0]
    return (sum(shape[0] for shape in inner), *inner[0][1:])


def _place(
    state: dict[str, torch.Tensor],
    piece: Piece,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    where: str,
    shard: Shard,
) -> None:
    """Copy a shard's part of a source tensor, or of its rows, to where it belongs in the state."""
    part = part_of(piece.target, shape, shard)
    target = state.get(piece.target)
    if piece.first_row is None and piece.index is None:
        own = tensor[part]
        if target is None:
            state[piece.target] = own.to(dtype, copy=True, memory_format=torch.contiguous_format)
        elif not torch.equal(target, own.to(dtype)):
            raise CheckpointError(
                f"{where}: tie_word_embeddings",
                "a stored head that is not the embedding",
                "the same tensor twice",
                "set it to false in config.json",
            )
    else:
        if target is None:
            target = state[piece.target] = tensor.new_empty(
                part_shape(piece.target, shape, shard), dtype=dtype
            )
        if piece.index is not None:
            target, part, shape = target[piece.index], part[1:], shape[1:]
        first = piece.first_row or 0
        target.copy_(tensor[first : first + shape[0]][part])
    if is_summand_bias(piece.target) and not shard.leads:
        state[piece.target].zero_()


def _write_weights(
    folder: Path, state: Mapping[str, torch.Tensor], config: ModelConfig, like: ShardedTensors | None
) -> None:
    pieces = _pieces_by_source(config)
    head = family_of(config).head_name
    if like is not None and config.tie_word_embeddings and head in like.entries:
        pieces[head] = [Piece(head, "embed_tokens.weight")]
    stored: torch.dtype = getattr(torch, config.torch_dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def dtype_of(name: str) -> torch.dtype:
        if like is not None:
            return like.entries[name].dtype
        return torch.float32 if pieces[name][0].target.endswith(ROUTER_BIAS) else stored

    def tensor_of(name: str) -> torch.Tensor:
        parts = [_part(state[piece.target], piece) for piece in pieces[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole.detach().to("cpu", dtype_of(name)).contiguous()
        # safetensors refuses two names for one memory.
        return whole.clone() if name == head and config.tie_word_embeddings else whole

    write_shards(
        folder,
        {name: (source_shape(parts, shapes), dtype_of(name)) for name, parts in pieces.items()},
        tensor_of,
        like,
    )


def _part(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return tensor if piece.index is None else tensor[piece.index]


def _copy_other_files(source: Path, target: Path) -> None:
    """Everything of a model folder that is not weights: small files that only the family's own users read."""
    for path in sorted(source.iterdir()):
        known = path.name in (*MODEL_FILES, INDEX_FILE, "__init__.py") or path.suffix in _WEIGHT_SUFFIXES
        if path.is_file() and not known and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")


def _write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """The source's own file where it says the same, byte for byte."""
    if path.is_file() and Tokenizer.from_file(str(path)).to_str() == tokenizer.to_str():
        return
    tokenizer.save(str(path))
