"""`fewstep generate`: one prompt, one answer, and how the canvas came to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fewstep.kernels.model.config import ComputeDtype
from fewstep.pipelines.models import model_folder
from fewstep.platform.config import Config
from fewstep.platform.records import DecodePolicy, Int16Array, Trajectory

_MASK = "░"


class GenerateConfig(Config):
    """What to continue, with which model, and what to show."""

    model: str = ""
    """A model folder, or models:/NAME@ALIAS; empty = the model shipped with the package."""
    tracking_uri: str = ""
    """MLflow store of a models:/ address; empty = MLFLOW_TRACKING_URI, else the store of `make demo`."""
    prompt: str | None = None
    """The text to continue; null = read standard input to its end."""
    suffix: str = ""
    """Text that stands behind the answer (infill); the answer then has exactly `max_tokens` places to fill."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of the answer at most."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    show: Literal["text", "steps"] = "text"
    """text = the answer; steps = also the film of the canvas, one line a forward, on standard error."""
    dtype: ComputeDtype = "saved"
    """Type to compute in; saved = as the checkpoint has it."""
    policy: DecodePolicy = DecodePolicy()


def run(config: GenerateConfig) -> None:
    """Prints the answer on standard output; with `show=steps` the film and the counts on standard error.

    Raises:
        UserError: the model cannot be loaded, or the prompt cannot be continued.
    """
    prompt = sys.stdin.read() if config.prompt is None else config.prompt
    # Here and not above: parsing and --help stay instant without torch.
    import torch

    from fewstep.actors.engine.engine import Engine
    from fewstep.actors.engine.request import Request
    from fewstep.kernels.model.checkpoint import load_model, state_checksum
    from fewstep.pipelines.film_strip import token_texts
    from fewstep.platform.records import WeightVersion

    torch.set_num_threads(1)
    folder = model_folder(config.model, config.tracking_uri)
    model, tokenizer = load_model(folder, None if config.dtype == "saved" else getattr(torch, config.dtype))
    version = WeightVersion("generate", 0, state_checksum(model.state_dict()))
    engine = Engine(model, tokenizer, max_sequences=1, weight_version=version)
    prompt_ids = tuple(tokenizer.encode(prompt).ids)
    request = Request(
        "generate",
        prompt_ids,
        config.policy,
        max_tokens=config.max_tokens,
        stop=config.stop,
        suffix_ids=tuple(tokenizer.encode(config.suffix).ids),
    )
    trajectory = engine.generate([request])[0]
    if config.show == "steps":
        size = config.policy.block_size or model.config.block_size
        aligned = model.config.attention_kind == "block_causal"
        print(film_strip(trajectory, token_texts(tokenizer, trajectory), size, aligned), file=sys.stderr)
    print(engine.text_of(trajectory, config.stop))


def film_strip(trajectory: Trajectory, texts: Sequence[str], block_size: int, aligned: bool = True) -> str:
    """The canvas after every forward, block by block; what a forward wrote is in brackets, masks are `░`.

    Args:
        trajectory: canvas of N positions that starts at absolute position P, the prompt's length.
        texts: text of each of the N positions.
        block_size: positions per block.
        aligned: blocks begin at multiples of it from position 0; else they are counted from the prompt's end.
    """
    block_of = (aligned * len(trajectory.prompt_ids) + np.arange(len(texts))) // block_size
    lines: list[str] = []
    for block in np.unique(block_of):
        positions = np.flatnonzero(block_of == block)
        steps = trajectory.step_map[positions]
        lines.append(f"block {block}, positions {positions[0]} to {positions[-1]}")
        lines += [_frame(texts, positions, steps, int(step)) for step in np.unique(steps[steps >= 0])]
    lines.append(
        f"{trajectory.num_tokens} tokens in {trajectory.forwards} forwards: "
        f"{trajectory.tokens_per_forward:.2f} tokens per forward ({trajectory.finish_reason})"
    )
    return "\n".join(lines)


def _frame(texts: Sequence[str], positions: NDArray[np.intp], steps: Int16Array, step: int) -> str:
    cells = []
    for position, written in zip(positions, steps, strict=True):
        if written < 0 or written > step:
            cells.append(_MASK)
        else:
            cells.append(f"[{texts[position]}]" if written == step else texts[position])
    return f"  {step + 1:>4} {''.join(cells)}"
