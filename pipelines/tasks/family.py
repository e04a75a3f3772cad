"""The embedded task family: small list functions asked for in a structured docstring.

A *specification* is one to three operations (`keep ...` or a map) and a reduction, for example

    keep odd; add 3; sum

Each has many right bodies on purpose: up to three styles, six loop variables, four result names and two spellings of
every expression, all chosen independently. One token at a time a model copes with that; opening many tokens at
once mixes the modes, and that is what on-policy refinement has to repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fewstep.platform.records import Check, Task
from fewstep.platform.rng import derive_seed, generator

LOOP_NAMES = ("x", "v", "n", "i", "e", "k")
RESULT_NAMES = ("a", "b", "c", "d")
STYLES = ("chain", "reuse", "loop")
HELD_OUT_ONE_IN = 10
NUM_HIDDEN_INPUTS = 16
MIN_DISTINCT_OUTPUTS = 6


@dataclass(frozen=True)
class Operation:
    """One step over a list of integers.

    Attributes:
        text: how the docstring says it.
        keeps: True for a filter, False for a map.
        spellings: equivalent expressions; `{v}` is the loop variable.
        apply: the meaning, on one element.
    """

    text: str
    keeps: bool
    spellings: tuple[str, ...]
    apply: Callable[[int], int | bool]


@dataclass(frozen=True)
class Reduction:
    """What is returned; `expression` has `{t}` for the list's name."""

    text: str
    expression: str
    apply: Callable[[list[int]], object]


def _constant_operations(k: int) -> Iterator[Operation]:
    yield Operation(f"add {k}", False, (f"{{v}} + {k}", f"{k} + {{v}}"), lambda x: x + k)
    yield Operation(f"multiply by {k}", False, (f"{{v}} * {k}", f"{k} * {{v}}"), lambda x: x * k)
    yield Operation(f"subtract {k}", False, (f"{{v}} - {k}", f"-{k} + {{v}}"), lambda x: x - k)
    yield Operation(f"keep above {k}", True, (f"{{v}} > {k}", f"{k} < {{v}}"), lambda x: x > k)
    yield Operation(f"keep below {k}", True, (f"{{v}} < {k}", f"{k} > {{v}}"), lambda x: x < k)
    yield Operation(
        f"keep multiples of {k}", True, (f"{{v}} % {k} == 0", f"not {{v}} % {k}"), lambda x: x % k == 0
    )


OPERATIONS: tuple[Operation, ...] = (
    Operation("square", False, ("{v} * {v}", "{v} ** 2"), lambda x: x * x),
    Operation("negate", False, ("-{v}", "0 - {v}"), lambda x: -x),
    Operation("keep even", True, ("{v} % 2 == 0", "{v} % 2 != 1"), lambda x: x % 2 == 0),
    Operation("keep odd", True, ("{v} % 2 == 1", "{v} % 2 != 0"), lambda x: x % 2 == 1),
    *(operation for k in range(2, 10) for operation in _constant_operations(k)),
)
REDUCTIONS: tuple[Reduction, ...] = (
    Reduction("sum", "sum({t})", sum),
    Reduction("count", "len({t})", len),
    Reduction("largest", "max({t}, default=0)", lambda xs: max(xs, default=0)),
    Reduction("smallest", "min({t}, default=0)", lambda xs: min(xs, default=0)),
    Reduction("sorted", "sorted({t})", sorted),
    Reduction("list", "{t}", list),
)
_OPERATION_BY_TEXT = {operation.text: operation for operation in OPERATIONS}
_REDUCTION_BY_TEXT = {reduction.text: reduction for reduction in REDUCTIONS}


@dataclass(frozen=True)
class Specification:
    """What a function must do; its text is its identity."""

    operations: tuple[Operation, ...]
    reduction: Reduction

    @classmethod
    def parse(cls, text: str) -> Specification:
        """The inverse of `text`; KeyError on an unknown phrase."""
        *operations, reduction = text.split("; ")
        return cls(tuple(_OPERATION_BY_TEXT[o] for o in operations), _REDUCTION_BY_TEXT[reduction])

    @property
    def text(self) -> str:
        return "; ".join([*(operation.text for operation in self.operations), self.reduction.text])

    @property
    def held_out(self) -> bool:
        """One specification in ten, by a hash of the specification (never of a program's text)."""
        return derive_seed("held-out", self.text) % HELD_OUT_ONE_IN == 0

    @property
    def prompt(self) -> str:
        return f'def f(xs):\n    """{self.text}"""'

    def evaluate(self, xs: list[int]) -> object:
        """The right answer, computed without any program text."""
        for operation in self.operations:
            xs = (
                [x for x in xs if operation.apply(x)]
                if operation.keeps
                else [int(operation.apply(x)) for x in xs]
            )
        return self.reduction.apply(xs)

    def hidden_inputs(self) -> list[list[int]]:
        """Lists this specification is checked on: dense around every constant, so that `> 5` and `> 6` differ."""
        draws = generator("hidden-inputs", self.text)
        sizes = [0, 1, *draws.integers(6, 24, NUM_HIDDEN_INPUTS - 2).tolist()]
        return [draws.integers(-15, 31, size).tolist() for size in sizes]

    def is_checkable(self) -> bool:
        """Whether the hidden inputs tell it from a constant function."""
        outputs = {repr(self.evaluate(xs)) for xs in self.hidden_inputs()}
        return len(outputs) >= MIN_DISTINCT_OUTPUTS

    def task(self) -> Task:
        inputs = self.hidden_inputs()
        return Task(
            task_id=self.text,
            prompt=self.prompt,
            check=Check(
                kind="call",
                entry_point="f",
                inputs=tuple((xs,) for xs in inputs),
                expected=tuple(self.evaluate(xs) for xs in inputs),
            ),
            canonical_solution=render_body(self, np.random.Generator(np.random.Philox(0))),
        )


def draw_specification(draws: np.random.Generator) -> Specification:
    """A random specification: one, two or three operations with probability 0.1, 0.4 and 0.5."""
    count = 1 + int(draws.choice(3, p=(0.1, 0.4, 0.5)))
    picked = draws.integers(0, len(OPERATIONS), count)
    return Specification(
        tuple(OPERATIONS[i] for i in picked), REDUCTIONS[int(draws.integers(0, len(REDUCTIONS)))]
    )


def specifications(seed: int, *, held_out: bool) -> Iterator[Specification]:
    """An endless stream of distinct, checkable specifications of one side of the split."""
    draws = generator("specifications", seed, int(held_out))
    seen: set[str] = set()
    while True:
        specification = draw_specification(draws)
        if (
            specification.held_out != held_out
            or specification.text in seen
            or not specification.is_checkable()
        ):
            continue
        seen.add(specification.text)
        yield specification


def tasks(count: int, seed: int, *, held_out: bool) -> list[Task]:
    """`count` tasks over distinct specifications."""
    stream = specifications(seed, held_out=held_out)
    return [next(stream).task() for _ in range(count)]


def render_body(specification: Specification, draws: np.random.Generator) -> str:
    """One of the many right bodies, every choice drawn independently."""
    # Three loops would make an answer of over 80 tokens; the longest answer stays at four to five blocks of 16.
    weights = (0.45, 0.3, 0.25) if len(specification.operations) < 3 else (0.6, 0.4, 0.0)
    style = STYLES[int(draws.choice(3, p=weights))]
    results = [RESULT_NAMES[i] for i in draws.permutation(len(RESULT_NAMES))]
    lines: list[str] = []
    source = "xs"
    for index, operation in enumerate(specification.operations):
        target = results[0] if style == "reuse" else results[index]
        name = LOOP_NAMES[int(draws.integers(0, len(LOOP_NAMES)))]
        expression = operation.spellings[int(draws.integers(0, len(operation.spellings)))].format(v=name)
        lines += _statement(style, operation.keeps, target, source, name, expression)
        source = target
    lines.append(f"    return {specification.reduction.expression.format(t=source)}")
    return "".join("\n" + line for line in lines)


def _statement(style: str, keeps: bool, target: str, source: str, name: str, expression: str) -> list[str]:
    if style == "loop":
        head = [f"    {target} = []", f"    for {name} in {source}:"]
        if keeps:
            return [*head, f"        if {expression}:", f"            {target}.append({name})"]
        return [*head, f"        {target}.append({expression})"]
    if keeps:
        return [f"    {target} = [{name} for {name} in {source} if {expression}]"]
    return [f"    {target} = [{expression} for {name} in {source}]"]


def draw_pair(draws: np.random.Generator) -> tuple[str, str]:
    """A training pair (prompt, body) of a specification that is not held out."""
    while True:
        specification = draw_specification(draws)
        if not specification.held_out:
            return specification.prompt, render_body(specification, draws)
