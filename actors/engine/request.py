"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import DecodePolicy, Trajectory

MAX_STOP_IDS = 8
MAX_STEPS = 32_767  # int16, the type of `Trajectory.step_map`

TokenState = Literal["committed", "edited", "provisional"]


@dataclass(frozen=True)
class Request:
    """One completion asked for.

    Attributes:
        request_id: unique among the requests the engine holds.
        prompt_ids: token ids, at least one, none of them the mask token.
        max_tokens: committed tokens at most, the end of sequence included; with `suffix_ids` exactly as many masks
            stand between prompt and suffix.
        stop: the completion ends before the first of these strings.
        stop_ids: further tokens that end the completion as the end of sequence does: counted, not shown.
        suffix_ids: what stands behind the masks from the start and stays (infill). A bidirectional model sees all
            of it from every mask, a block-causal one what shares a block with the mask.
        ignore_eos: the end of sequence and `stop_ids` are tokens like others; for benchmarks of fixed length.
        watch: every step that decides sends the canvas of the live block in its update.
        priority: among waiting requests higher ones get a slot first, equal ones in the order they came. It changes
            nothing for requests that hold a slot.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    policy: DecodePolicy
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    watch: bool = False
    priority: int = 0

    def validate(self, config: ModelConfig) -> None:
        """Raise a RequestError that names the first field this model cannot serve."""
        if not self.prompt_ids:
            raise RequestError("prompt", "no tokens", "at least one token", "send a non-empty prompt")
        _check_ids("prompt", self.prompt_ids, config)
        _check_ids("suffix", self.suffix_ids, config)
        _check_ids("stop_ids", self.stop_ids, config)
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise RequestError(
                "stop_ids", f"{len(self.stop_ids)} ids", f"at most {MAX_STOP_IDS}", "send fewer stop ids"
            )
        if self.max_tokens < 1:
            raise RequestError("max_tokens", self.max_tokens, "at least 1", "ask for at least one token")
        context = context_length(config)
        asked = len(self.prompt_ids) + self.max_tokens + len(self.suffix_ids)
        if asked > context:
            suffix = f" + {len(self.suffix_ids)} suffix tokens" if self.suffix_ids else ""
            raise RequestError(
                "max_tokens",
                f"{len(self.prompt_ids)} prompt tokens + {self.max_tokens}{suffix}",
                f"at most {context} together",
                "shorten the prompt or lower max_tokens",
            )
        if "" in self.stop:
            raise RequestError("stop", "an empty string", "non-empty strings", "remove it")
        _check_policy(self, config)


def _check_ids(field: str, ids: tuple[int, ...], config: ModelConfig) -> None:
    if config.mask_token_id in ids:
        raise RequestError(
            field,
            f"the mask token (id {config.mask_token_id})",
            "any other token; masks are what the model writes over",
            f"remove the mask token from the {field}",
        )
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < config.vocab_size:
            raise RequestError(
                field, f"token id {token}", f"0 to {config.vocab_size - 1}", "use this model's tokenizer"
            )


def _check_policy(request: Request, config: ModelConfig) -> None:
    policy, hole_end = request.policy, len(request.prompt_ids) + request.max_tokens
    size = policy.block_size or config.block_size
    if config.attention_kind == "block_causal":
        if size != config.block_size:
            raise RequestError(
                "block_size",
                size,
                f"{config.block_size}, which the model was trained with",
                "leave block_size out",
            )
        if policy.cache in ("prefix", "dual"):
            raise RequestError(
                "cache",
                policy.cache,
                "exact or none: a block-causal model's cache is exact already",
                "leave cache out",
            )
        if request.suffix_ids and hole_end % size == 0:
            raise RequestError(
                "suffix",
                f"a suffix that begins with a block (position {hole_end}, blocks of {size})",
                "one that shares a block with the last mask: a block-causal model never looks at later blocks",
                "change max_tokens, or use a bidirectional model",
            )
    elif config.logit_shift and policy.cache in ("prefix", "dual"):
        raise RequestError(
            "cache",
            policy.cache,
            "exact or none: this model's logits are shifted, a block's first needs the row before the block",
            "leave cache out",
        )
    elif size > context_length(config):
        raise RequestError("block_size", size, f"at most {context_length(config)}", "use smaller blocks")
    num_steps = -(-request.max_tokens // size + 1) * (size + policy.max_edit_steps)
    if min(num_steps, request.max_tokens + 2 * size) > MAX_STEPS:
        raise RequestError(
            "max_tokens",
            f"{request.max_tokens}, up to {num_steps} steps",
            f"at most {MAX_STEPS} steps, as many as a step map can number",
            "ask for fewer tokens",
        )


def check_model(config: ModelConfig) -> None:
    """Raise a CheckpointError for a model that this engine cannot denoise: one that was not trained to."""
    if config.attention_kind == "causal":
        raise CheckpointError(
            "attention_kind",
            "an autoregressive model",
            "block diffusion, or a bidirectional model",
            "convert the checkpoint, or train one with `fewstep pretrain`",
        )


def check_pages(
    request: Request, config: ModelConfig, num_pages: int, page_size: int, page_bytes: int
) -> None:
    """Raise a RequestError if a request needs more pages at once than there are."""
    end = len(request.prompt_ids) + request.max_tokens
    if config.attention_kind == "block_causal":
        needed = 0 if request.policy.cache == "none" else (end - 1) // page_size
    elif request.policy.cache in ("prefix", "dual"):
        needed = -(-(end + len(request.suffix_ids)) // page_size)
    else:
        needed = 0
    if needed > num_pages:
        raise RequestError(
            "max_tokens",
            f"{end} positions, {needed * page_bytes:,} bytes of keys and values",
            f"at most {num_pages * page_bytes:,} bytes, the engine's budget",
            "shorten the request or give the engine more memory",
        )


@dataclass(frozen=True)
class CanvasView:
    """The live block of one request as a forward left it, as far as it belongs to the answer.

    Not shown: prompt, suffix, what lies behind `max_tokens`, a written end of sequence and what lies behind it.

    Attributes:
        revision: forwards that decided something for the request, this one included.
        start: position of the first token in the answer; before: the answer's tokens before it, all of them final.
        ids, states: one of each per position. `provisional` is a mask, and its id what the forward would have written.
    """

    revision: int
    start: int
    before: tuple[int, ...]
    ids: tuple[int, ...]
    states: tuple[TokenState, ...]


@dataclass(frozen=True)
class Update:
    """What a step made final for one request, or what a watched one looks like now.

    Attributes:
        text: newly final text; the concatenation over all updates of a request is its completion.
        num_new_tokens: newly final tokens; they add up to the trajectory's num_tokens.
        trajectory: set in the last update of a request that finished.
        error: set in the last update of a request that failed.
        canvas: set in every update of a watched request that did not fail.
    """

    request_id: str
    text: str
    num_new_tokens: int
    trajectory: Trajectory | None = None
    error: str | None = None
    canvas: CanvasView | None = None

    @property
    def last(self) -> bool:
        """Nothing follows for this request."""
        return self.trajectory is not None or self.error is not None


def context_length(config: ModelConfig) -> int:
    """Positions a request can use; whole blocks only where blocks have their place."""
    if config.attention_kind == "bidirectional":
        return config.max_position_embeddings
    return config.max_position_embeddings // config.block_size * config.block_size
