"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy, Trajectory


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
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    policy: DecodePolicy
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def validate(self, config: ModelConfig) -> None:
        """Raise a RequestError that names the first field this model cannot serve."""
        if not self.prompt_ids:
            raise RequestError("prompt", "no tokens", "at least one token", "send a non-empty prompt")
        if config.mask_token_id in self.prompt_ids:
            raise RequestError(
                "prompt",
                f"the mask token (id {config.mask_token_id})",
                "any other token; masks are what the model writes over",
                "remove the mask token from the prompt",
            )
        for token in (min(self.prompt_ids), max(self.prompt_ids)):
            if not 0 <= token < config.vocab_size:
                raise RequestError(
                    "prompt",
                    f"token id {token}",
                    f"0 to {config.vocab_size - 1}",
                    "use this model's tokenizer",
                )
        if self.max_tokens < 1:
            raise RequestError("max_tokens", self.max_tokens, "at least 1", "ask for at least one token")
        context = context_length(config)
        if len(self.prompt_ids) + self.max_tokens > context:
            raise RequestError(
                "max_tokens",
                f"{len(self.prompt_ids)} prompt tokens + {self.max_tokens}",
                f"at most {context} together",
                "shorten the prompt or lower max_tokens",
            )
        if "" in self.stop:
            raise RequestError("stop", "an empty string", "non-empty strings", "remove it")


@dataclass(frozen=True)
class Update:
    """What a step made final for one request.

    Attributes:
        text: newly final text; the concatenation over all updates of a request is its completion.
        num_new_tokens: newly final tokens; they add up to the trajectory's num_tokens.
        trajectory: set in the last update of a request that finished.
        error: set in the last update of a request that failed.
    """

    request_id: str
    text: str
    num_new_tokens: int
    trajectory: Trajectory | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Nothing follows for this request."""
        return self.trajectory is not None or self.error is not None


def context_length(config: ModelConfig) -> int:
    """Positions a request can use: whole blocks only."""
    return config.max_position_embeddings // config.block_size * config.block_size
