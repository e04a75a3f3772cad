"""Fewstep's engine behind the protocol the peers' adapters speak; runs in Fewstep's own environment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from adapter import Adapter, Message, serve, torch_dtype

from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.request import Request
from fewstep.kernels.linear import PackedWeight
from fewstep.kernels.model.checkpoint import load_model
from fewstep.platform.records import DecodePolicy, Trajectory, WeightVersion

FLOOR_REPEATS = 5


class Ours(Adapter):
    """Every request at once through `Engine.generate`; each run has prompts of its own, so no prefix is shared."""

    batches = True
    packages = ("torch", "fewstep")

    def load(self, message: Message) -> None:
        model, tokenizer = load_model(Path(message["model"]), torch_dtype(message))
        version = WeightVersion("peers", 0, "0" * 32)
        self.engine = Engine(model, tokenizer, max_sequences=message["max_sequences"], weight_version=version)
        self.runs = 0
        self.shapes: Counter[tuple[int, int]] = Counter()
        self.done: list[Trajectory] = []
        model.register_forward_pre_hook(self._seen)

    def _seen(self, _module: Any, positional: tuple[Any, ...]) -> None:
        tokens, rows = positional[0], positional[3]
        self.shapes[tokens.shape[1], len(rows)] += 1

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        engine = self.engine
        kind = settings["kind"]
        number = {"static": "tokens_per_step", "threshold": "threshold"}[kind]
        policy = DecodePolicy(
            kind=kind,
            cache=settings["cache"],
            block_size=settings["block_size"] if engine.config.attention_kind == "bidirectional" else None,
            **{number: settings[number]},
        )
        self.runs += 1
        requests = [
            Request(f"{self.runs}-{index}", tuple(prompt), policy, settings["max_tokens"], ignore_eos=True)
            for index, prompt in enumerate(prompts)
        ]
        self.shapes.clear()
        before = engine.forwards, engine.rows
        self.done = engine.generate(requests)
        self.forwards, self.rows = engine.forwards - before[0], engine.rows - before[1]
        return [trajectory.completion_ids.tolist() for trajectory in self.done]

    def openings(self, answers: list[list[int]]) -> list[list[list[list[float]]]]:
        """From the step map, which is kept anyway; margins are the peer's to give."""
        del answers
        return [_openings(trajectory) for trajectory in self.done]

    def measure(self, message: Message) -> Message:
        """Seconds of the matrix products of the last `generate`, alone: every linear map at the rows it had."""
        del message
        with torch.inference_mode():
            per_shape = {shape: self._floor(*shape) for shape in self.shapes}
        total = [0.0, 0.0]
        for shape, count in self.shapes.items():
            total = [have + one * count for have, one in zip(total, per_shape[shape], strict=True)]
        return {"seconds": total[0], "cpu_seconds": total[1]}

    def _floor(self, num_rows: int, num_active: int) -> tuple[float, float]:
        """One forward's products, with the weights as torch has them or packed, whichever is faster."""
        model = self.engine.model
        weights: list[tuple[torch.Tensor, int]] = []
        last = len(model.layers) - 1
        for index, layer in enumerate(model.layers):
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2:
                    # The last layer needs all rows for its keys and values, and the queries come along.
                    whole = index < last or name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
                    weights.append((parameter, num_rows if whole else num_active))
        weights.append((model.head_weight, num_active))
        return min(self._time(weights, layout) for layout in layouts(model.head_weight))

    def _time(
        self,
        weights: list[tuple[torch.Tensor, int]],
        layout: Callable[[torch.Tensor], Callable[[torch.Tensor], Any]],
    ) -> tuple[float, float]:
        """Median wall and CPU seconds of all products once."""
        products = []
        for weight, num_rows in weights:
            x = torch.ones(1, num_rows, weight.shape[1], dtype=weight.dtype)
            products.append((layout(weight), x))
        seconds, cpu_seconds = [], []
        for _ in range(FLOOR_REPEATS):
            started, worked = time.perf_counter(), time.process_time()
            for product, x in products:
                product(x)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - worked)
        return median(seconds), median(cpu_seconds)


def layouts(weight: torch.Tensor) -> list[Callable[[torch.Tensor], Callable[[torch.Tensor], Any]]]:
    """Ways to hold a weight for products; packed where this machine supports it."""
    plain: Callable[[torch.Tensor], Callable[[torch.Tensor], Any]] = lambda w: lambda x: F.linear(x, w)
    if not PackedWeight.supported(weight):
        return [plain]
    return [plain, lambda w: PackedWeight(w).linear]


def _openings(trajectory: Trajectory) -> list[list[list[float]]]:
    """Rows `[position, 1, token, log-probability, 0]` of each step that wrote something."""
    size = trajectory.num_tokens
    steps: dict[int, list[list[float]]] = {}
    for position, step in enumerate(trajectory.step_map[:size].tolist()):
        token, logprob = int(trajectory.canvas_ids[position]), float(trajectory.logprob[position])
        steps.setdefault(step, []).append([position, 1, token, logprob, 0.0])
    return [steps[step] for step in sorted(steps)]


if __name__ == "__main__":
    serve(Ours())
