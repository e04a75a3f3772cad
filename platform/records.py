"""The nouns everyone shares. Frozen, validated at the edge, free of torch and Ray.

Legend: P prompt tokens; N canvas tokens (all generated blocks, a whole number of blocks minus the prompt's
tail); a *step* is one forward in which the request took part, counted from 0 for each request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Int32Array = NDArray[np.int32]
Int16Array = NDArray[np.int16]
Float32Array = NDArray[np.float32]

PolicyKind = Literal["threshold", "static", "entropy_bound", "factor"]
CacheKind = Literal["exact", "none", "prefix", "dual"]
FinishReason = Literal["stop", "length", "abort"]
Outcome = Literal[
    "passed", "wrong_answer", "runtime_error", "syntax_error", "timeout", "memory", "sandbox_error"
]


# Counts of a policy fit any integer that they are put into, a tensor's or a file's.
MAX_COUNT = 2**31 - 1

KIND_NUMBERS: dict[PolicyKind, str] = {
    "threshold": "threshold",
    "static": "tokens_per_step",
    "entropy_bound": "entropy_bound",
    "factor": "factor",
}


class DecodePolicy(BaseModel):
    """How the masked positions of a block are opened; one per request (design.md §2).

    Confidence is the untempered softmax probability of the token that would be written, entropy that of the same
    distribution in nats. Every kind opens at least the best position of a step:

    - `threshold` opens every masked position whose confidence is at least `threshold` (Fast-dLLM, 2505.22618).
    - `static` opens the `tokens_per_step` most confident ones.
    - `entropy_bound` opens the longest run of lowest-entropy positions whose entropies, the largest left out, add up
      to at most `entropy_bound` (EB sampler, 2505.24857).
    - `factor` opens the largest n with (n + 1)(1 - c_n) < `factor`, c_n the n-th highest confidence (Fast-dLLM).

    A field of another kind than the chosen one would do nothing, so it is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: PolicyKind = "threshold"
    threshold: float = Field(default=0.9, gt=0.0, le=1.0, description="used by kind=threshold")
    tokens_per_step: int = Field(default=1, ge=1, le=MAX_COUNT, description="used by kind=static")
    entropy_bound: float = Field(default=0.1, ge=0.0, description="nats; used by kind=entropy_bound")
    factor: float = Field(default=1.0, gt=0.0, description="used by kind=factor")
    block_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="positions denoised together; None = the model's own, the only choice of a block-causal model",
    )
    cache: CacheKind = Field(
        default="exact",
        description="exact = all that changes no token; none = recompute everything; prefix and dual reuse stale keys "
        "and values of a bidirectional model (Fast-dLLM's approximations)",
    )
    refresh_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="forwards of a block between recomputations of a prefix or dual cache; None = once a block",
    )
    edit_threshold: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="a written token is replaced by another one of more than this confidence (LLaDA2.1, 2602.08676); "
        "None = written tokens stay",
    )
    max_edit_steps: int = Field(
        default=16,
        ge=0,
        le=MAX_COUNT,
        description="forwards that may edit a block after its last mask; used with edit_threshold",
    )
    max_steps_per_block: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="after this many forwards a block opens all that is left; None = no limit",
    )
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _every_field_acts(self) -> DecodePolicy:
        idle = [name for name in KIND_NUMBERS.values() if name != KIND_NUMBERS[self.kind]]
        if self.edit_threshold is None:
            idle.append("max_edit_steps")
        if self.cache not in ("prefix", "dual"):
            idle.append("refresh_every")
        for name in idle:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing with {self._why_idle(name)}")
        return self

    def _why_idle(self, name: str) -> str:
        if name == "max_edit_steps":
            return "edit_threshold unset"
        return f"cache={self.cache}" if name == "refresh_every" else f"kind={self.kind}"

    @property
    def number(self) -> float:
        """The number that belongs to the kind, such as the threshold."""
        return float(getattr(self, KIND_NUMBERS[self.kind]))

    def label(self) -> str:
        """Short name for tables and metric keys, such as `threshold_0.9` or `static_1`."""
        name = f"{self.kind}_{self.number:g}"
        if self.cache != "exact":
            name += f"_{self.cache}"
        return name if self.edit_threshold is None else f"{name}_edit_{self.edit_threshold:g}"


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
        suffix_ids: int32 [S], what the request asked to stand behind the canvas (infill); empty otherwise.
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
        edit_position, edit_step, edit_token, edit_logprob: [E], what editing wrote over: position in the canvas
            (int32), the step at which the lost token had been written (int16), the token (int32) and its
            log-probability then (float32). With the arrays above they are every write there was.
        cache_drift: mean relative change ‖K - K'‖ / ‖K‖ of the keys that refreshes of an approximate cache
            replaced; 0 where the cache is exact.
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
    edit_position: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    edit_step: Int16Array = field(default_factory=lambda: np.empty(0, np.int16))
    edit_token: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    edit_logprob: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))
    cache_drift: float = 0.0
    suffix_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))

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
        score: in [0, 1], fraction of tests passed, or another verifier's measure; 1.0 where all passed.
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


CheckKind = Literal["call", "script", "source", "stdin", "reference"]


@dataclass(frozen=True)
class Check:
    """How an answer is verified. Exactly one of five forms, the safest first.

    call: `entry_point` is called with each of `inputs` (positional arguments as JSON lists) inside the
        sandbox; what it returns is sent out and compared with `expected` outside, so the program never sees
        the right answers.
    stdin: the program is run once for each of `inputs` (one text each) on its standard input; what it prints is
        compared with `expected` outside, line by line.
    script: `test_code` (HumanEval shape: it must define `check(candidate)`) runs in a sandboxed process of its
        own, calls the program by message, and passes if it returns. Each of `parts` is such a function and a test.
    source: program and `test_code` are one program in `language`, or, with `module`, two files of which the tests
        import the program's by that name. It passes if it ends well after its last test: for tests that cannot
        be told apart from the program (docs/decisions/0011-other-languages.md).
    reference: nothing is executed: another verifier than `tests` holds the answer against the task's canonical
        solution or its tags (actors/judges.py).

    Attributes:
        language: of the program, a name of actors/sandbox/languages.py; `call` and `script` are Python's alone.
        entry_point: the function asked for; a name for humans where kind is `source`, `stdin` or `reference`.
    """

    kind: CheckKind
    entry_point: str
    inputs: tuple[tuple[Any, ...], ...] = ()
    expected: tuple[Any, ...] = ()
    test_code: str = ""
    parts: tuple[str, ...] = ("check",)
    language: str = "python"
    module: str = ""

    @property
    def executes(self) -> bool:
        """Whether it starts processes of its language's tools, which not every host and isolation can."""
        return self.kind in ("source", "stdin")


@dataclass(frozen=True)
class Task:
    """A prompt and its check.

    Attributes:
        prompt: the text the model continues.
        timeout_s: wall seconds in the sandbox, compilation aside.
        canonical_solution: an answer that is known to be right; empty = none is known.
        header: what stands before the answer in the program, where that is not the prompt (chat, edits).
        suffix: what stands behind the answer in the program; an infilling model is shown it.
    """

    task_id: str
    prompt: str
    check: Check
    timeout_s: float = 2.0
    canonical_solution: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    header: str | None = None
    suffix: str = ""

    def program(self, answer: str) -> str:
        """The source text that is judged."""
        return (self.prompt if self.header is None else self.header) + answer + self.suffix


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
