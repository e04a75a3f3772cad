"""Model folders in Hugging Face layout: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.artifacts import atomic_folder
from fewstep.platform.errors import CheckpointError

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def embedded_model() -> Path:
    """The folder of the model shipped with the package."""
    return Path(__file__).resolve().parent / "embedded"


def state_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """blake2b over names, shapes and bytes, in name order; equal weights give equal checksums anywhere."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{array.dtype}:{tuple(array.shape)}".encode())
        digest.update(array.view(torch.uint8).numpy().data if array.numel() else b"")
    return digest.hexdigest()


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """tokenizer.json of a model folder, checked against the model's vocabulary size and mask token."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file", "a tokenizers file beside the weights", "copy it there"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception on a malformed file
        raise CheckpointError(
            str(path), f"unreadable ({error})", "a tokenizers JSON file", "copy it again"
        ) from error
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise CheckpointError(
            str(path),
            f"{tokenizer.get_vocab_size()} tokens",
            f"the model's vocab_size {config.vocab_size}",
            "use the tokenizer the model was trained with",
        )
    return tokenizer


def load_state(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """model.safetensors of a folder, names and shapes checked against the configuration."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(str(path), "no such file", "a safetensors file", "check the path")
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            str(path), f"unreadable ({error})", "a whole safetensors file", "copy it again"
        ) from error
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Transformer(config).state_dict().items()}
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            str(path),
            f"missing {missing[:4]}, surplus {surplus[:4]}",
            "the tensors of config.json",
            "re-export the model",
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{path}:{name}",
                tuple(state[name].shape),
                f"shape {shape}",
                "use the config.json of these weights",
            )
    return state


def load_model(folder: Path) -> tuple[Transformer, Tokenizer]:
    """A model in eval mode and its tokenizer.

    Raises:
        CheckpointError: a file is missing, corrupt, or does not fit the others.
    """
    config = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, config)
    model = Transformer(config)
    model.load_state_dict(load_state(folder, config))
    return model.eval(), tokenizer


def save_model(
    folder: Path, state: Mapping[str, torch.Tensor], config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Write a model folder whole or not at all; an older one of that name is replaced.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with atomic_folder(Path(folder)) as temporary:
            (temporary / "config.json").write_text(config.dump())
            save_file(tensors, str(temporary / "model.safetensors"), metadata={"format": "pt"})
            tokenizer.save(str(temporary / "tokenizer.json"))
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes its file readable by the owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(folder), str(error), "a writable folder", "check its permissions"
        ) from error
