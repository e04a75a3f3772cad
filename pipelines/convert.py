"""`fewstep convert`: an autoregressive model becomes a block-diffusion model in a public format of that kind.

Llama becomes what Stable-DiffCoder is, Qwen3 what SDAR is, Qwen2 what Fast-dLLM v2 is: names and shapes of the tensors
stay, config.json changes, and a mask token is there. The weights know nothing of masks until they are trained on data.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from fewstep.kernels.model.checkpoint import load_state, save_model
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.lora_settings import chosen_modules
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines import pretrain
from fewstep.pipelines.corpus import TOKENIZER
from fewstep.pipelines.gguf_source import SUFFIX, unpacked
from fewstep.pipelines.lineage import CONVERSION
from fewstep.pipelines.models import pinned_model
from fewstep.pipelines.settings import ConvertConfig
from fewstep.platform.artifacts import file_digest, weights_digest
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import derive_seed

NEW_MASK = "<|mask|>"
_KNOWN_MASKS = ("<|mask|>", "<|MASK|>", "<[MASK_TOKEN]>", "[MASK]", "<mask>")
_RESERVED = re.compile(r"reserved|unused|<\|extra_\d+\|>|placeholder", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """The block-diffusion format that a family's models are continued in."""

    family: str
    fields: dict[str, Any]
    block_key: str


TARGETS = {
    "llama": Target(
        "stable_diffcoder",
        {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]},
        "block_size",
    ),
    "qwen3": Target("sdar", {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "block_size"),
    "qwen2": Target(
        "fast_dllm_v2",
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]},
        "bd_size",
    ),
}


@dataclass(frozen=True)
class MaskToken:
    """Which token is the mask, and how it was found: `named`, `known`, `reserved`, `unused row`, `new row`."""

    text: str
    token_id: int
    found: str


def run(config: ConvertConfig) -> None:
    """Write `out/model`; with `data`, convert into `out/start` and train through the warm-up over block sizes.

    A GGUF file is unpacked into `out/source` first.

    Raises:
        UserError: a source that cannot be converted or lacks a module that an adapter is asked for, or data that do not
            fit it.
    """
    address, source = pinned_model(config.source, config.tracking_uri or "")
    if source.suffix == SUFFIX:
        source = unpacked(source, config.out / "source")
    if config.trainer.lora is not None:
        chosen_modules(ModelConfig.load(source), config.trainer.lora.target_modules)
    start = config.out / ("start" if config.data else "model")
    mask = convert_model(source, start, config.block_size, config.mask_token, config.seed, address)
    print(
        f"wrote {start}: {TARGETS[ModelConfig.load(source).family].family}, block size {config.block_size},"
        f" mask token {mask.text!r} ({mask.found}, id {mask.token_id})",
        flush=True,
    )
    if config.data:
        pretrain.run(config.pretraining(start))
    else:
        print("it has not learned to denoise yet: give data, or run fewstep pretrain on it", flush=True)


def convert_model(
    source: Path, out: Path, block_size: int, mask_token: str = "", seed: int = 0, address: str = ""
) -> MaskToken:
    """Write the converted model; every weight of the source is kept as it is.

    The mask's embedding is drawn around the mean of all embeddings with their standard deviation in each dimension: an
    untrained row is near zero, and a zero row is blown up by the first norm (LLaDA2.0, 2512.15745, adds noise for it).

    Args:
        source: folder of an autoregressive model; out: the folder to write.
        address: what `source` was called, for the record.
    Raises:
        ConfigError: a source that is not autoregressive. CheckpointError: one that cannot be loaded.
    """
    old = ModelConfig.load(source)
    if old.family not in TARGETS:
        raise ConfigError(
            "source", f"{source}, a {old.family} model", f"one of {', '.join(TARGETS)}",
            "train it with fewstep pretrain as it is" if old.attention_kind != "causal" else "use another model",
        )  # fmt: skip
    tokenizer = load_tokenizer(source, old)
    mask = choose_mask(tokenizer, old, mask_token)
    state = load_state(source, old)
    for name in {"embed_tokens.weight", "lm_head.weight"} & state.keys():
        noise = name == "embed_tokens.weight"
        state[name] = _with_row(
            state[name], mask.token_id, derive_seed("mask-embedding", seed) if noise else None
        )
    new = _new_config(old, TARGETS[old.family], block_size, mask, len(state["embed_tokens.weight"]))
    save_model(out, state, new, tokenizer, source)
    record = {"source": address or str(source), "source_digest": weights_digest(source), "source_family": old.family,
              "family": new.family, "block_size": block_size, "mask": asdict(mask),
              "source_tokenizer": file_digest(source / TOKENIZER)}  # fmt: skip
    (out / CONVERSION).write_text(json.dumps(record, indent=2) + "\n")
    return mask


def choose_mask(tokenizer: Tokenizer, config: ModelConfig, wanted: str) -> MaskToken:
    """The mask token; `tokenizer` gets a new one where it has none to spare.

    An existing mask or reserved token is taken before a row of the embedding that no token uses, that before a new row.
    """
    if wanted and (number := tokenizer.token_to_id(wanted)) is not None:
        return MaskToken(wanted, number, "named")
    special = {n: t.content for n, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special}
    taken = {config.eos_token_id, config.pad_token_id}
    if not wanted:
        for number, text in special.items():
            if text in _KNOWN_MASKS and number not in taken:
                return MaskToken(text, number, "known")
        for number, text in special.items():
            if _RESERVED.search(text) and number not in taken:
                return MaskToken(text, number, "reserved")
    text = wanted or NEW_MASK
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    number = tokenizer.get_vocab()[text]
    return MaskToken(text, number, "unused row" if number < config.vocab_size else "new row")


def _with_row(matrix: torch.Tensor, row: int, noise_seed: int | None) -> torch.Tensor:
    """The matrix with one row (in it, or right behind it) set to the mean of the others, with noise where seeded."""
    values = matrix.float()
    others = values if row >= len(values) else torch.cat((values[:row], values[row + 1 :]))
    fresh = others.mean(0)
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        fresh = fresh + others.std(0) * torch.randn(len(fresh), generator=generator)
    changed = (
        matrix.clone()
        if row < len(matrix)
        else torch.cat((matrix, matrix.new_zeros(row + 1 - len(matrix), matrix.shape[1])))
    )
    changed[row] = fresh.to(matrix.dtype)
    return changed


def _new_config(
    old: ModelConfig, target: Target, block_size: int, mask: MaskToken, vocab_size: int
) -> ModelConfig:
    """The source's config.json with the target's fields, read back through its family."""
    values: dict[str, Any] = json.loads(old.source or "{}")
    values.pop("auto_map", None)  # it names modelling code of another architecture
    values |= target.fields | {
        target.block_key: block_size,
        "mask_token_id": mask.token_id,
        "vocab_size": vocab_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        return ModelConfig.load(Path(folder))
