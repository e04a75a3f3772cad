"""Orders from the model's own answers: generated freely by the engine, kept only where the sandbox says they are right."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.actors.verifier import LocalVerifier
from fewstep.kernels.model.transformer import Transformer
from fewstep.pipelines.distill_settings import PoolConfig
from fewstep.pipelines.estimators import slices
from fewstep.pipelines.frontier import refuse_broken
from fewstep.pipelines.order_pool import Order, path_bound
from fewstep.platform.records import DecodePolicy, Task, Trajectory, WeightVersion
from fewstep.platform.rng import derive_seed


class FreeOrders:
    """Draws answers of tasks and gives the orders of the right ones; owns an engine and a sandbox, no Ray.

    Args:
        model: the engine's from here on; judge: the same weights, for the scores.
        seed: of the run; each answer's is keyed by (seed, sample, number).

    Raises:
        ResourceError: the host cannot isolate.
    """

    def __init__(
        self, model: Transformer, judge: Transformer, tokenizer: Tokenizer, config: PoolConfig, seed: int
    ) -> None:
        version = WeightVersion("distill", 0, "")
        self._engine = Engine(model, tokenizer, max_sequences=config.num_free or 1, weight_version=version)
        self._verifier, self._judge = LocalVerifier(), judge
        self._tokenizer, self._config, self._seed = tokenizer, config, seed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._verifier.close()

    def draw(self, task: Task, sample: int) -> list[Order]:
        """Orders of the task's right answers, numbered behind the teacher-forced ones; maybe none.

        Raises:
            FewstepError: the verifier itself failed on all of them.
        """
        prompt = tuple(self._tokenizer.encode(task.prompt).ids)
        trajectories = self._engine.generate(
            [self._request(prompt, sample, number) for number in range(self._config.num_free)]
        )
        answers = [(task, self._engine.text_of(trajectory)) for trajectory in trajectories]
        verdicts = self._verifier.verify(answers)
        refuse_broken(verdicts, "free answers", forgiven=self._config.num_free - 1)
        return [
            order_of(trajectory, sample, self._config.num_orders + number, self._judge)
            for number, (trajectory, verdict) in enumerate(zip(trajectories, verdicts, strict=True))
            if verdict.passed and is_whole(trajectory)
        ]

    def _request(self, prompt: Sequence[int], sample: int, number: int) -> Request:
        policy = DecodePolicy(
            threshold=self._config.threshold,
            temperature=self._config.free_temperature,
            seed=derive_seed("free-order", self._seed, sample, number),
        )
        return Request(f"{sample}-{number}", tuple(prompt), policy, max_tokens=self._config.free_tokens)


def is_whole(trajectory: Trajectory) -> bool:
    """Every position of the canvas was written: the answer ended by itself."""
    return trajectory.finish_reason == "stop" and bool((trajectory.step_map >= 0).all())


def order_of(trajectory: Trajectory, sample: int, number: int, judge: Transformer) -> Order:
    """A recorded answer as an order. It is scored anew: the record has no probability of what was filled in behind the
    end, and the other orders' scores count that, too."""
    found = slices(trajectory, judge.config.block_size)
    start = int(found.positions[0])
    tokens = np.concatenate((trajectory.prompt_ids[:start].astype(np.int64), found.tokens))
    step = np.concatenate((np.full(start, -1, np.int64), found.local_step))
    num_prompt = len(trajectory.prompt_ids)
    score = path_bound(judge, tokens, num_prompt, step)
    return Order(sample, number, tokens, num_prompt, step, score, found.num_rounds)
