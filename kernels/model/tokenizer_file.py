"""The tokenizer of a model folder. Free of torch: what only reads and writes text has no use for it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import CheckpointError

_FILE = "tokenizer.json"


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """tokenizer.json of a model folder, checked against the model's vocabulary size.

    Ours has exactly the model's tokens; other families pad their embedding, so fewer are fine there.
    """
    tokenizer, path = read_tokenizer(folder), Path(folder) / _FILE
    size, padded = tokenizer.get_vocab_size(), config.family != "fewstep"
    if size > config.vocab_size or (size < config.vocab_size and not padded):
        raise CheckpointError(
            str(path),
            f"{size} tokens",
            f"{'at most ' if padded else ''}the model's vocab_size {config.vocab_size}",
            "use the tokenizer the model was trained with",
        )
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a model folder, whoever's model it is.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file", "a tokenizers file beside the weights", "copy it there"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception on a malformed file
        raise CheckpointError(
            str(path), f"unreadable ({error})", "a tokenizers JSON file", "copy it again"
        ) from error
