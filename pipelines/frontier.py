"""The speed-quality frontier of a model: what each decode policy costs and what share of the tasks it solves.

Quality is pass@1 on distinct tasks, one answer each. Cost is forwards per answer, which depends on the weights,
the tasks and the policy alone; tokens per second depends on the machine as well. Every forward an answer took
part in counts, the one that also writes a finished block's keys and values included (it denoises, too); tokens
after the end of sequence do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from fewstep.actors.engine.request import Request
from fewstep.actors.engine.text import decode
from fewstep.pipelines.tasks.answer_format import PLAIN, AnswerFormat
from fewstep.pipelines.tasks.prepared import Prepared
from fewstep.platform.errors import FewstepError
from fewstep.platform.records import DecodePolicy, FrontierPoint, Rollout, Task, Trajectory, Verdict
from fewstep.platform.rng import derive_seed
from fewstep.platform.rollout_trace import EXTRACT, GENERATE, VERIFY, Clock, Window

Generate = Callable[[Sequence[Request]], list[Trajectory]]
Verify = Callable[[Sequence[tuple[Task, str]]], list[Verdict]]
Observe = Callable[[FrontierPoint, list[Rollout]], None]

SEQUENTIAL = DecodePolicy(kind="static", tokens_per_step=1)
"""One token per step: the slowest policy, and the reference every other one is held against."""
TOLERANCE = 0.01
"""How far below the reference's pass@1 a policy may fall and still count as equally good."""
MAX_SANDBOX_ERRORS = 0.05
"""Share of verdicts that may be the verifier's own failure before what is made of them is worth nothing."""
# 0.95 - 0.01 is a hair above 0.94 in binary; a share of at most 10^6 tasks never differs from the bar by less.
_ROUNDING = 1e-9


def is_sequential(policy: DecodePolicy) -> bool:
    """Whether a policy is the reference: greedy, one token per step, without a limit of steps."""
    one_by_one = policy.kind == "static" and policy.tokens_per_step == 1
    return one_by_one and policy.max_steps_per_block is None and policy.temperature == 0.0


@dataclass(frozen=True)
class Answered:
    """Answers in the order they were asked for, judged.

    Attributes:
        texts: completions as the model wrote them; what was read of them is judged.
        windows: when each stage began and ended.
    """

    tasks: Sequence[Task]
    texts: list[str]
    trajectories: list[Trajectory]
    verdicts: list[Verdict]
    windows: Mapping[str, Window]

    @property
    def seconds(self) -> float:
        """Of generation."""
        return self.windows[GENERATE].seconds

    def rows(self) -> Iterator[tuple[Task, str, Trajectory, Verdict]]:
        """One answer after the other, each with its task."""
        return zip(self.tasks, self.texts, self.trajectories, self.verdicts, strict=True)


def answer(
    tasks: Sequence[Task],
    requests: Sequence[Request],
    generate: Generate,
    verify: Verify,
    tokenizer: Tokenizer,
    answers: AnswerFormat,
    *,
    what: str,
    forgiven: int = 0,
) -> Answered:
    """Generate, decode, read, judge; a verifier that fails is no lost quality.

    Args:
        tasks: one for each request.
        what: the answers' name in the message.
        forgiven: failures of the verifier that are let pass in any case.
    Raises:
        FewstepError: as `refuse_broken`.
    """
    clock = Clock()
    trajectories = generate(requests)
    clock.lap(GENERATE)
    texts = [decode(tokenizer, trajectory.completion_ids.tolist()) for trajectory in trajectories]
    jobs = [(task, answers.read(task, text)) for task, text in zip(tasks, texts, strict=True)]
    clock.lap(EXTRACT)
    verdicts = verify(jobs)
    clock.lap(VERIFY)
    refuse_broken(verdicts, what, forgiven)
    return Answered(tasks, texts, trajectories, verdicts, clock.windows)


def refuse_broken(verdicts: Sequence[Verdict], what: str, forgiven: int = 0) -> None:
    """Checks that the verdicts are the verifier's.

    Raises:
        FewstepError: it failed on more than `MAX_SANDBOX_ERRORS` of them, and on more than `forgiven`.
    """
    broken = [verdict.detail for verdict in verdicts if verdict.outcome == "sandbox_error"]
    if len(broken) > max(forgiven, MAX_SANDBOX_ERRORS * len(verdicts)):
        most = Counter(broken).most_common(1)[0][0]
        raise FewstepError(
            f"{what}: the verifier itself failed on {len(broken)} of {len(verdicts)} answers: {most}"
        )


def measure(
    asked: Sequence[Prepared],
    policies: Sequence[DecodePolicy],
    generate: Generate,
    verify: Verify,
    tokenizer: Tokenizer,
    *,
    answers: AnswerFormat = PLAIN,
    observe: Observe | None = None,
) -> list[FrontierPoint]:
    """One point per policy, in order; the reference comes first and is added where `policies` lacks it.

    Prints a line per policy.

    Args:
        asked: distinct tasks in the model's tokens; each is answered once under each policy.
        generate: requests to trajectories, in order (an engine's or a replica pool's).
        verify: pairs of task and completion to verdicts, in order.
        tokenizer: the model's.
        answers: how a completion is read.
        observe: called after each policy with its point and its rollouts.
    Raises:
        ValueError: no tasks, or a task twice.
        RequestError: a prompt that the model cannot serve.
        FewstepError: the verifier itself failed on more than `MAX_SANDBOX_ERRORS` of a policy's answers.
    """
    tasks = [one.task for one in asked]
    if not tasks or len({task.task_id for task in tasks}) != len(tasks):
        raise ValueError("a frontier needs at least one task and no task twice")
    others = [policy for policy in dict.fromkeys(policies) if not is_sequential(policy)]
    points = []
    for number, policy in enumerate([SEQUENTIAL, *others], start=1):
        requests = [one.request(str(index), _keyed(policy, one.task)) for index, one in enumerate(asked)]
        found = answer(tasks, requests, generate, verify, tokenizer, answers, what=policy.label())
        points.append(summarise(policy, found.trajectories, found.verdicts, found.seconds))
        print(f"  {number:>2}/{len(others) + 1}  {one_line(points[-1])}  {found.seconds:.1f} s", flush=True)
        if observe is not None:
            observe(points[-1], _rollouts(found))
    return points


def _keyed(policy: DecodePolicy, task: Task) -> DecodePolicy:
    """The policy with a seed of its own for each task, so that draws at temperature > 0 are independent."""
    return policy.model_copy(update={"seed": derive_seed("frontier", policy.seed, task.task_id)})


def _rollouts(found: Answered) -> list[Rollout]:
    """Measured, not trained on: each task is a group of one, and the reward is the score itself."""
    return [
        Rollout(task.task_id, group, 0, text, trajectory, verdict, reward=verdict.score)
        for group, (task, text, trajectory, verdict) in enumerate(found.rows())
    ]


def summarise(
    policy: DecodePolicy, trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], seconds: float
) -> FrontierPoint:
    """The point of one policy.

    Args:
        trajectories, verdicts: one per task, in the same order.
        seconds: wall time of generating all of them.
    """
    num_tasks = len(trajectories)
    if len(verdicts) != num_tasks:
        raise ValueError(f"{len(verdicts)} verdicts for {num_tasks} answers")
    num_tokens = sum(trajectory.num_tokens for trajectory in trajectories)
    forwards = sum(trajectory.forwards for trajectory in trajectories)
    return FrontierPoint(
        policy=policy,
        pass_at_1=sum(verdict.passed for verdict in verdicts) / num_tasks,
        forwards_per_answer=forwards / num_tasks,
        tokens_per_forward=num_tokens / forwards,
        tokens_per_second=num_tokens / seconds,
        num_tasks=num_tasks,
        outcomes=dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
    )


def one_line(point: FrontierPoint) -> str:
    """A point for the terminal."""
    return (
        f"{point.policy.label():<15} pass@1 {point.pass_at_1:.3f}  {point.forwards_per_answer:6.2f} forwards/answer  "
        f"{point.tokens_per_forward:5.2f} tokens/forward  {point.tokens_per_second:6.0f} tokens/s"
    )


def standard_error(point: FrontierPoint) -> float:
    """Of pass@1, as a share of independent tasks (binomial)."""
    return math.sqrt(point.pass_at_1 * (1.0 - point.pass_at_1) / point.num_tasks)


def sequential_point(points: Sequence[FrontierPoint]) -> FrontierPoint:
    """The reference of a frontier. Raises ValueError where it was not measured."""
    for point in points:
        if is_sequential(point.policy):
            return point
    raise ValueError("the frontier has no point at one token per step")


def reaches(pass_at_1: float, bar: float) -> bool:
    """Whether a pass@1 is at a bar or above; a bar is a difference, and its last digits are arithmetic, not quality."""
    return pass_at_1 >= bar - _ROUNDING


def cheapest_within(points: Sequence[FrontierPoint], bar: float) -> FrontierPoint | None:
    """The point with the fewest forwards per answer whose pass@1 reaches `bar`; None where none does."""
    good = [point for point in points if reaches(point.pass_at_1, bar)]
    return min(good, key=lambda point: (point.forwards_per_answer, -point.pass_at_1), default=None)


def quality_bar(reference: FrontierPoint) -> float:
    """pass@1 that counts as equally good: the reference's, less `TOLERANCE`."""
    return max(0.0, reference.pass_at_1 - TOLERANCE)


@dataclass(frozen=True)
class Speedup:
    """How many times fewer forwards a refined model needs at the same quality.

    The rival is the unrefined model at its own best policy, not at its slowest.

    Attributes:
        bar: pass@1 to hold: the unrefined model's at one token per step, less `TOLERANCE`.
        sequential: the unrefined model at one token per step.
        before: the unrefined model's cheapest point at the bar.
        after: the refined model's; None if no policy of it holds the bar, and then so are the speedups.
        speedup_forwards: forwards per answer of `before` / of `after`.
        speedup_vs_sequential: forwards per answer of `sequential` / of `after`.
    """

    bar: float
    sequential: FrontierPoint
    before: FrontierPoint
    after: FrontierPoint | None
    speedup_forwards: float | None
    speedup_vs_sequential: float | None

    def text(self) -> str:
        """One or two lines for a terminal or a report."""
        before = f"{self.before.forwards_per_answer:.2f} forwards per answer ({self.before.policy.label()})"
        if self.after is None:
            return (
                f"No policy of the refined model reaches the bar of {self.bar:.3f} pass@1; before: {before}."
            )
        return (
            f"At {self.bar:.3f} pass@1 or better: {before} before, {self.after.forwards_per_answer:.2f} "
            f"({self.after.policy.label()}) after refinement.\n{self.speedup_forwards:.2f}x fewer forwards, "
            f"{self.speedup_vs_sequential:.2f}x fewer than one token per step."
        )


def compare(before: Sequence[FrontierPoint], after: Sequence[FrontierPoint]) -> Speedup:
    """Both models held to the same bar. Raises ValueError on frontiers over different numbers of tasks."""
    if len({point.num_tasks for point in (*before, *after)}) != 1:
        raise ValueError("frontiers over different numbers of tasks cannot be compared")
    sequential = sequential_point(before)
    bar = quality_bar(sequential)
    rival, refined = cheapest_within(before, bar) or sequential, cheapest_within(after, bar)
    if refined is None:
        return Speedup(bar, sequential, rival, None, None, None)
    return Speedup(
        bar=bar,
        sequential=sequential,
        before=rival,
        after=refined,
        speedup_forwards=rival.forwards_per_answer / refined.forwards_per_answer,
        speedup_vs_sequential=sequential.forwards_per_answer / refined.forwards_per_answer,
    )


def accuracy_under_parallelism(
    points: Sequence[FrontierPoint], *, best: float | None = None, alpha: float = 3.0, window: float = 5.0
) -> float:
    """AUP of d3LLM: one number for a frontier, an autoregressive model's being its accuracy in percent.

    With points (rho = tokens per forward, y = pass@1 in percent) by rising rho, those below y_1 - window left out:

        AUP = rho_1 y_1 + 1/2 sum_{i>=2} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})),
        W(y) = min(exp(-alpha (1 - y / y_max)), 1)

    Args:
        best: y_max in percent, the best accuracy of any method on the tasks; None = the best of these points.
        alpha: how hard a loss of accuracy is punished.
        window: percentage points.
    """
    curve = sorted((point.tokens_per_forward, 100.0 * point.pass_at_1) for point in points)
    floor = curve[0][1] - window
    curve = [(rho, y) for rho, y in curve if y >= floor - 100.0 * _ROUNDING]
    top = max(y for _, y in curve) if best is None else best
    if top <= 0.0:
        return 0.0
    weighted = [(rho, y * min(math.exp(-alpha * (1.0 - y / top)), 1.0)) for rho, y in curve]
    area = curve[0][0] * curve[0][1]
    for (rho_1, y_1), (rho_2, y_2) in pairwise(weighted):
        area += 0.5 * (rho_2 - rho_1) * (y_1 + y_2)
    return area


def point_record(point: FrontierPoint) -> dict[str, Any]:
    """A point as JSON, with the policy's short name and the error bar of pass@1."""
    record = {**asdict(point), "policy": point.policy.model_dump(mode="json"), "label": point.policy.label()}
    return record | {"pass_at_1_standard_error": standard_error(point)}


def speedup_record(speedup: Speedup) -> dict[str, Any]:
    """A comparison as JSON."""
    return {
        "bar": speedup.bar,
        "before": point_record(speedup.before),
        "after": None if speedup.after is None else point_record(speedup.after),
        "sequential": point_record(speedup.sequential),
        "speedup_forwards": speedup.speedup_forwards,
        "speedup_vs_sequential": speedup.speedup_vs_sequential,
        "text": speedup.text(),
    }
