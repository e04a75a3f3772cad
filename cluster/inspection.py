"""`fewstep inspect PATH`: what a model folder holds, what it needs, and what will run it; or what an adapter is. Reads no
weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from fewstep.cluster.adapter_inspection import AdapterReport, adapter_lines, inspect_adapter
from fewstep.pipelines.models import model_folder
from fewstep.platform.config import Config
from fewstep.platform.errors import CheckpointError

if TYPE_CHECKING:
    from fewstep.kernels.model.config import ModelConfig
    from fewstep.kernels.model.shards import ShardedTensors

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# float32 weight, gradient, and AdamW's two moments.
_TRAINING_BYTES = 16


class InspectConfig(Config):
    """Which model folder, and how to print what is found."""

    model: str = ""
    """A model folder, or models:/NAME@ALIAS; empty = the model shipped with the package. Or the folder of a LoRA adapter."""
    tracking_uri: str = ""
    """MLflow store of a models:/ address; empty = MLFLOW_TRACKING_URI, else the store of `make demo`."""
    show: Literal["text", "json"] = "text"
    """json = one object, for programs."""


@dataclass(frozen=True)
class Report:
    """Everything `fewstep inspect` says; bytes and counts are plain numbers.

    Attributes:
        parameters: of the model; active_parameters: those a token meets in a mixture of experts; embedding_parameters:
            embedding and head.
        weight_bytes: by dtype; kv_bytes_per_token: cached keys and values of one position, by dtype.
        training_bytes: float32 weights, gradients and AdamW's moments on one rank, activations not counted.
        free_bytes: memory of this machine that is free now.
        generates, trains: "yes, ...", or why not.
    """

    folder: str
    family: str
    architecture: str
    attention_kind: str
    block_size: int
    logit_shift: bool
    max_position_embeddings: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tokenizer_size: int
    special_tokens: dict[str, str]
    experts: str
    rope: str
    parameters: int
    active_parameters: int
    embedding_parameters: int
    stored_dtype: str
    files: int
    file_bytes: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    training_bytes: int
    free_bytes: int
    generates: str
    trains: str


def run(config: InspectConfig) -> None:
    """Print the report.

    Raises:
        CheckpointError: the folder is of no known family, or its files do not fit each other.
    """
    # Here and not above: parsing and --help stay instant without torch.
    from fewstep.kernels.model.adapter_folder import is_adapter

    folder = model_folder(config.model, config.tracking_uri)
    report = inspect_adapter(folder, config.tracking_uri) if is_adapter(folder) else inspect_model(folder)
    print(json.dumps(asdict(report), indent=2) if config.show == "json" else _text(report))


def inspect_model(folder: Path) -> Report:
    """Configuration, tokenizer and weight headers of a folder, checked against each other.

    Raises:
        CheckpointError: names what is missing, surplus, or of another shape.
    """
    # Here and not above: parsing and --help stay instant without torch.
    from fewstep.kernels.model.checkpoint import check_weights
    from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
    from fewstep.kernels.model.tokenizer_file import load_tokenizer

    config = ModelConfig.load(folder)
    tokenizer = load_tokenizer(folder, config)
    files = check_weights(folder, config)
    parameters, embedding, idle = _count(files, config)
    special = {
        name: f"{token} {tokenizer.id_to_token(token) or '(not in the tokenizer)'}"
        for name in ("mask_token_id", "eos_token_id", "pad_token_id")
        if (token := getattr(config, name)) != NO_TOKEN
    }
    weight_bytes = {name: parameters * size for name, size in _DTYPE_BYTES.items()}
    free, training = psutil.virtual_memory().available, parameters * _TRAINING_BYTES
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Report(
        folder=str(folder),
        family=config.family,
        architecture=", ".join(config.architectures),
        **{name: getattr(config, name) for name in _COPIED},
        tokenizer_size=tokenizer.get_vocab_size(),
        special_tokens=special,
        experts=_experts(config),
        rope=_rope(config),
        parameters=parameters,
        active_parameters=parameters - idle,
        embedding_parameters=embedding,
        stored_dtype=" and ".join(
            sorted({str(entry.dtype).removeprefix("torch.") for entry in files.entries.values()})
        ),
        files=len(files.metadata),
        file_bytes=sum(entry.num_bytes for entry in files.entries.values()),
        weight_bytes=weight_bytes,
        kv_bytes_per_token={name: numbers * size for name, size in _DTYPE_BYTES.items()},
        training_bytes=training,
        free_bytes=free,
        generates=_generates(config, weight_bytes, free),
        trains="yes"
        if training < free
        else f"not here: one rank needs more than the {byte_text(free)} that are free",
    )


_COPIED = (
    "attention_kind",
    "block_size",
    "logit_shift",
    "max_position_embeddings",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def _count(files: ShardedTensors, config: ModelConfig) -> tuple[int, int, int]:
    """Parameters, those of embedding and head, and those of experts that a token does not meet."""
    from fewstep.kernels.model.checkpoint import own_shapes

    total = embedding = experts = 0
    for name, shape in own_shapes(config).items():
        size = prod(shape)
        total += size
        embedding += size if name.startswith(("embed_tokens.", "lm_head.")) else 0
        experts += size if ".mlp.experts." in name else 0
    idle = 0
    if config.moe is not None:
        idle = experts * (config.moe.num_experts - config.moe.num_experts_per_tok) // config.moe.num_experts
    return total, embedding, idle


def _experts(config: ModelConfig) -> str:
    moe = config.moe
    if moe is None:
        return "none"
    shared = f" and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    layers = f"layers {moe.first_k_dense_replace} to {config.num_hidden_layers - 1}"
    return f"{moe.num_experts_per_tok} of {moe.num_experts} routed{shared}, {layers}"


def _rope(config: ModelConfig) -> str:
    parts = [f"theta {config.rope_theta:g}"]
    if config.partial_rotary_factor < 1:
        parts.append(f"{config.rotary_dim} of {config.head_dim} dimensions")
    if config.rope_scaling is not None:
        parts.append(f"{config.rope_scaling.kind} x{config.rope_scaling.factor:g}")
    return ", ".join(parts)


def _generates(config: ModelConfig, weight_bytes: dict[str, int], free: int) -> str:
    from fewstep.actors.engine.request import check_model

    try:
        check_model(config)
    except CheckpointError as error:
        return f"no: the engine was given {error.got} and takes {error.allowed}"
    fitting = [name for name, size in weight_bytes.items() if size < free]
    if not fitting:
        return f"not here: the weights need more than the {byte_text(free)} that are free"
    return f"yes, in {' or '.join(fitting)}"


def _text(report: Report | AdapterReport) -> str:
    lines = adapter_lines(report) if isinstance(report, AdapterReport) else _lines(report)
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _lines(report: Report) -> list[tuple[str, str]]:
    moe = "" if report.experts == "none" else f", {_millions(report.active_parameters)} of them active"
    shift = "the row before predicts a token" if report.logit_shift else "a token is predicted at its own row"
    heads = (
        f"{report.num_attention_heads} heads of {report.head_dim} over {report.num_key_value_heads} key heads"
    )
    return [
        ("folder", report.folder),
        ("family", f"{report.family} ({report.architecture})"),
        ("attention", f"{report.attention_kind}, blocks of {report.block_size}; {shift}"),
        ("context", f"{report.max_position_embeddings:,} positions; rope {report.rope}"),
        (
            "layers",
            f"{report.num_hidden_layers} of {report.hidden_size}, {heads}; experts: {report.experts}",
        ),
        ("vocabulary", f"{report.vocab_size:,} rows, {report.tokenizer_size:,} tokens"),
        (
            "special",
            ", ".join(f"{n.removesuffix('_token_id')} {t}" for n, t in report.special_tokens.items()),
        ),
        (
            "parameters",
            f"{_millions(report.parameters)}{moe}, {_millions(report.embedding_parameters)} in embedding and head",
        ),
        ("stored", f"{report.stored_dtype}, {report.files} files, {byte_text(report.file_bytes)}"),
        *((f"as {name}", _memory(report, name)) for name in report.weight_bytes),
        (
            "training",
            f"{byte_text(report.training_bytes)} a rank for weights, gradients and AdamW, plus activations",
        ),
        ("free here", byte_text(report.free_bytes)),
        ("generates", report.generates),
        ("trains", report.trains),
    ]


def _memory(report: Report, name: str) -> str:
    per_token = report.kv_bytes_per_token[name]
    whole = per_token * report.max_position_embeddings
    return (
        f"{byte_text(report.weight_bytes[name])} of weights, {byte_text(per_token)} of keys and values a token"
        f" ({byte_text(whole)} at full context)"
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def byte_text(size: int) -> str:
    """A size as people read it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
