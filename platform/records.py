"""The nouns everyone shares. Frozen, validated at the edge, free of torch and Ray.

Legend: P prompt tokens; N canvas tokens (all generated blocks, a whole number of blocks minus the prompt's
tail); a *step* is one forward in which the request took part, counted from 0 for each request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Int32Array = NDArray[np.int32]
Int16Array = NDArray[np.int16]
Float32Array = NDArray[np.float32]

PolicyKind = Literal["threshold", "static"]
FinishReason = Literal["stop", "length", "abort"]
Outcome = Literal[
    "passed", "wrong_answer", "runtime_error", "syntax_error", "timeout", "memory", "sandbox_error"
]


class DecodePolicy(BaseModel):
    """How the masked positions of a block are opened; one per request (design.md §2).

    `threshold` opens every masked position whose confidence is at least `threshold`, and always at least the
    best one (Fast-dLLM, 2505.22618). `static` opens the `tokens_per_step` most confident positions each step.
    Confidence is the untempered softmax probability of the token that would be written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: PolicyKind = "threshold"
    threshold: float = Field(default=0.9, gt=0.0, le=1.0, description="used by kind=threshold")
    tokens_per_step: int = Field(default=1, ge=1, description="used by kind=static")
    max_steps_per_block: int | None = Field(
        default=None,
        ge=1,
        description="after this many forwards a block opens all that is left; None = no limit",
    )
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def label(self) -> str:
        """Short name for tables and metric keys, such as `threshold_0.9` or `static_1`."""
        return (
            f"threshold_{self.threshold:g}" if self.kind == "threshold" else f"static_{self.tokens_per_step}"
        )


@dataclass(frozen=True)
class WeightVersion:
    """Which weights: run id, training step, and the content checksum of the state dict."""

    run_id: str
    step: int
    checksum: str

    def __str__(self) -> str:
        return f"{self.run_id}:{self.step}:{self.checksum[:12]}"


@dataclass(frozen=True)
class Trajectory:
    """How one completion came to be; enough to rebuild every intermediate canvas.

    Attributes:
        prompt_ids: int32 [P].
        canvas_ids: int32 [N], the final token at every generated position, including what lies after the
            end-of-sequence token inside the last block.
        step_map: int16 [N], the step at which the position was written; positions filled with end-of-sequence
            because an earlier one was committed carry that step and a NaN confidence (nobody chose them);
            -1 = never written: the token is still the mask (after an abort, a stop string or `length`).
        confidence: float32 [N], untempered probability of the token at commit; NaN = not chosen by the model.
        logprob: float32 [N], log-probability of the token under the sampling distribution's untempered model
            at commit; NaN = not chosen by the model.
        num_tokens: committed tokens that count: up to and including the first end of sequence, cut at
            max_tokens and before a stop string.
        forwards: forwards in which the request took part.
        seed: the request's seed; weight versions: the first and the last the request saw.
    """

    prompt_ids: Int32Array
    canvas_ids: Int32Array
    step_map: Int16Array
    confidence: Float32Array
    logprob: Float32Array
    num_tokens: int
    forwards: int
    finish_reason: FinishReason
    policy: DecodePolicy
    seed: int
    weight_version_first: str
    weight_version_last: str

    @property
    def completion_ids(self) -> Int32Array:
        """int32 [num_tokens], what the user is given and billed for."""
        return self.canvas_ids[: self.num_tokens]

    @property
    def tokens_per_forward(self) -> float:
        """TPF: committed tokens per forward."""
        return self.num_tokens / max(1, self.forwards)


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one answer.

    Attributes:
        outcome: outcome class; only `passed` earns reward.
        score: in [0, 1], fraction of tests passed (1.0 iff outcome is `passed`).
        tests: per-test pass flags, in order; shorter than asked when the program died early.
        seconds: wall time in the sandbox.
        isolation: the layers that were really in force, e.g. `process+rlimits+netns+mountns`.
        detail: last line of the error, for humans; never trusted.
    """

    outcome: Outcome
    score: float
    tests: tuple[bool, ...]
    seconds: float
    isolation: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Rollout:
    """One verified sample: trajectory, verdict, reward, and the group (prompt) it belongs to."""

    task_id: str
    group_id: int
    sample: int
    text: str
    trajectory: Trajectory
    verdict: Verdict
    reward: float
    advantage: float = 0.0


@dataclass(frozen=True)
class Check:
    """How an answer is verified. Exactly one of the two forms.

    call: `entry_point` is called with each of `inputs` (positional arguments as JSON lists) inside the
        sandbox; what it returns is sent out and compared with `expected` outside, so the program never sees
        the right answers.
    script: `test_code` (HumanEval shape: it must define `check(candidate)`) runs in a sandboxed process of its
        own, calls the program by message, and passes if it returns.
    """

    kind: Literal["call", "script"]
    entry_point: str
    inputs: tuple[tuple[Any, ...], ...] = ()
    expected: tuple[Any, ...] = ()
    test_code: str = ""


@dataclass(frozen=True)
class Task:
    """A prompt and its check. `prompt` is the text the model continues; program = prompt + completion."""

    task_id: str
    prompt: str
    check: Check
    timeout_s: float = 2.0
    canonical_solution: str = ""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontierPoint:
    """One decode policy measured on a task set.

    tokens_per_second is committed tokens over wall seconds of generation with all replicas in use.
    """

    policy: DecodePolicy
    pass_at_1: float
    forwards_per_answer: float
    tokens_per_forward: float
    tokens_per_second: float
    num_tasks: int
    outcomes: dict[str, int]
