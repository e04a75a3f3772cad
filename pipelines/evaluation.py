"""The loop of an evaluation: every task of a benchmark answered and judged under every policy, saved part by part.

A result is a function of (weights, task, policy, seed, sample). A part is a run of tasks under one policy, written whole
or not at all; an interrupted evaluation reads what is there and goes on behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.verifier import Verifier
from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.evaluation_settings import EvaluateConfig
from fewstep.pipelines.frontier import SEQUENTIAL, Generate, answer
from fewstep.pipelines.tasks.benchmark import Benchmark, Exclusion
from fewstep.pipelines.tasks.prepared import Prepared, prompt_tokens
from fewstep.platform.errors import RequestError
from fewstep.platform.records import DecodePolicy, Outcome, Rollout, Task
from fewstep.platform.rng import derive_seed
from fewstep.platform.trajectories import read_metadata, read_rollouts, write_rollouts


@dataclass(frozen=True)
class Contender(ABC):
    """What answers: a model under test, or the baseline it is held against.

    Attributes:
        address: as the user gave it; `pinned` is what it stood for when the evaluation started.
        weights_sha256: digest of the weights.
        slot: its folder below the run's: `model`; `first` and `second` where two are compared; `baseline`.
    """

    address: str
    pinned: str
    folder: Path
    weights_sha256: str
    slot: str
    tokenizer: Tokenizer
    chat: ChatTemplate

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raises RequestError where it cannot be asked this."""

    def seen(self, suffix_ids: tuple[int, ...], _behind: int) -> tuple[int, ...]:
        """What it can see of a suffix that stands behind so many tokens."""
        return suffix_ids

    @property
    def identity(self) -> dict[str, str]:
        """What a report says of it."""
        return {"address": self.address, "pinned": self.pinned, "weights_sha256": self.weights_sha256}


@dataclass(frozen=True)
class Subject(Contender):
    """A diffusion model under test."""

    model: ModelConfig

    def check(self, request: Request) -> None:
        request.validate(self.model)

    def seen(self, suffix_ids: tuple[int, ...], behind: int) -> tuple[int, ...]:
        """All of it; of a block-causal model what shares the last mask's block."""
        if self.model.attention_kind != "block_causal":
            return suffix_ids
        return suffix_ids[: -behind % self.model.block_size]


@dataclass(frozen=True)
class Answer:
    """One judged answer: a row of answers.parquet.

    Attributes:
        text: what the model wrote; `answer` is what was read of it and judged.
        tests: per-test flags of the verdict.
    """

    slot: str
    benchmark: str
    task_id: str
    language: str
    policy: str
    seed: int
    sample: int
    outcome: Outcome
    passed: bool
    score: float
    tests: tuple[bool, ...]
    num_tokens: int
    forwards: int
    finish_reason: str
    verdict_seconds: float
    isolation: str
    detail: str
    text: str
    answer: str


@dataclass(frozen=True)
class Measured:
    """Everything one policy did on one benchmark, in the order of the tasks; `seconds` of generation, all replicas in use."""

    policy: DecodePolicy
    answers: list[Answer]
    seconds: float


def prepare(
    subject: Contender, benchmark: Benchmark, config: EvaluateConfig
) -> tuple[list[Prepared], list[Exclusion]]:
    """The tasks in the model's tokens, and those that its context is too short for."""
    ready, excluded = [], []
    for task in benchmark.tasks:
        prepared = _prepared(subject, benchmark, task, config)
        try:
            subject.check(prepared.request("0", SEQUENTIAL))
        except RequestError as error:
            excluded.append(Exclusion(task.task_id, f"{error.field}: {error.got}; allowed: {error.allowed}"))
        else:
            ready.append(prepared)
    return ready, excluded


def _prepared(subject: Contender, benchmark: Benchmark, task: Task, config: EvaluateConfig) -> Prepared:
    tokenizer = subject.tokenizer
    prompt_ids = prompt_tokens(task, tokenizer, subject.chat if benchmark.chat else None)
    stop = benchmark.answers.stop(task)
    if not benchmark.infill:
        return Prepared(task, prompt_ids, (), config.max_tokens, stop)
    hole = config.infill_tokens or len(
        tokenizer.encode(task.canonical_solution, add_special_tokens=False).ids
    )
    suffix_ids = tuple(tokenizer.encode(task.suffix, add_special_tokens=False).ids)
    suffix_ids = subject.seen(suffix_ids, len(prompt_ids) + max(1, hole))
    return Prepared(task, prompt_ids, suffix_ids, max(1, hole), stop)


def policies(config: EvaluateConfig) -> list[DecodePolicy]:
    """One token per step first, then the sweep, all at the run's temperature."""
    sampling = {"temperature": config.temperature, "top_p": config.top_p}
    return list(
        dict.fromkeys(policy.model_copy(update=sampling) for policy in (SEQUENTIAL, *config.sweep.policies()))
    )


def measure_policy(
    subject: Contender,
    benchmark: Benchmark,
    prepared: Sequence[Prepared],
    policy: DecodePolicy,
    config: EvaluateConfig,
    generate: Generate,
    verifier: Verifier,
) -> Measured:
    """All answers of one policy: from the parts that are saved, else generated, judged and saved.

    Prints how far it is.

    Raises:
        FewstepError: the verifier itself failed on more than `MAX_SANDBOX_ERRORS` of a part's answers.
    """
    folder = config.out / "trajectories" / subject.slot / benchmark.name / policy.label()
    answers: list[Answer] = []
    seconds, done, rest = 0.0, 0, iter(prepared)
    while part := list(islice(rest, config.tasks_per_part)):
        path = folder / f"{done:06d}.parquet"
        if not path.is_file():
            _answer_part(path, benchmark, part, policy, config, subject, generate, verifier)
        rollouts, spent = read_rollouts(path), float(read_metadata(path)["seconds"])
        answers += [_row(subject, benchmark, policy, config, *pair) for pair in _pairs(part, rollouts)]
        seconds, done = seconds + spent, done + len(part)
        passed = sum(answer.passed for answer in answers) / len(answers)
        print(
            f"  {policy.label():<16} {done:>5}/{len(prepared)} tasks  {passed:.3f} passed  {seconds:.1f} s",
            flush=True,
        )
    return Measured(policy, answers, seconds)


def _answer_part(
    path: Path,
    benchmark: Benchmark,
    part: Sequence[Prepared],
    policy: DecodePolicy,
    config: EvaluateConfig,
    subject: Contender,
    generate: Generate,
    verifier: Verifier,
) -> None:
    """Generates, reads, judges and saves; a part that the verifier broke on is not saved, and so is asked again."""
    jobs = [
        (item, seed, sample) for item in part for seed in config.seeds for sample in range(config.num_samples)
    ]
    requests = []
    for number, (item, seed, sample) in enumerate(jobs):
        keyed = derive_seed("evaluate", benchmark.name, item.task.task_id, seed, sample)
        requests.append(item.request(str(number), policy.model_copy(update={"seed": keyed})))
    tasks = [item.task for item, _, _ in jobs]
    found = answer(
        tasks, requests, generate, verifier.verify, subject.tokenizer, benchmark.answers,
        what=benchmark.name,
    )  # fmt: skip
    rollouts = [
        Rollout(task.task_id, seed, sample, text, trajectory, verdict, reward=verdict.score)
        for (_, seed, sample), (task, text, trajectory, verdict) in zip(jobs, found.rows(), strict=True)
    ]
    facts = {"model": subject.identity, "benchmark": benchmark.name, "digest": benchmark.digest}
    write_rollouts(
        path, rollouts, {**facts, "policy": policy.model_dump(mode="json"), "seconds": found.seconds}
    )


def _pairs(part: Sequence[Prepared], rollouts: Sequence[Rollout]) -> list[tuple[Task, Rollout]]:
    tasks = {item.task.task_id: item.task for item in part}
    return [(tasks[rollout.task_id], rollout) for rollout in rollouts]


def _row(
    subject: Contender,
    benchmark: Benchmark,
    policy: DecodePolicy,
    config: EvaluateConfig,
    task: Task,
    rollout: Rollout,
) -> Answer:
    trajectory, verdict = rollout.trajectory, rollout.verdict
    return Answer(
        slot=subject.slot,
        benchmark=benchmark.name,
        task_id=task.task_id,
        language=task.check.language,
        policy=policy.label(),
        seed=rollout.group_id,
        sample=rollout.sample,
        outcome=verdict.outcome,
        passed=verdict.passed,
        score=verdict.score,
        tests=verdict.tests,
        num_tokens=trajectory.num_tokens,
        forwards=trajectory.forwards,
        finish_reason=trajectory.finish_reason,
        verdict_seconds=verdict.seconds,
        isolation=verdict.isolation,
        detail=verdict.detail,
        text=rollout.text,
        answer=benchmark.answers.read(task, rollout.text),
    )


def without(benchmark: Benchmark, excluded: Sequence[Exclusion]) -> Benchmark:
    """The benchmark with further tasks left out, each for its reason."""
    names = {exclusion.task_id for exclusion in excluded}
    tasks = tuple(task for task in benchmark.tasks if task.task_id not in names)
    return replace(benchmark, tasks=tasks, excluded=(*benchmark.excluded, *excluded))
