"""Judges: what a verifier asks of one answer. Plug-ins, named by a short name or by `package.module:Class`.

A judge is built once in every verifier worker and asked for one answer at a time; what a model wrote is run in the
sandbox it is given, and nowhere else. It must be a function of (task, answer), so that an answer whose worker died can
be judged again.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from fewstep.actors.sandbox.sandbox import Sandbox
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import Check, Outcome, Task, Verdict
from fewstep.platform.registry import nearest, resolve

JUDGES = {
    "tests": "fewstep.actors.judges:Tests",
    "exact": "fewstep.actors.judges:ExactMatch",
    "regex": "fewstep.actors.judges:RegularExpression",
    "json_schema": "fewstep.actors.judges:JsonSchema",
    "compiles": "fewstep.actors.judges:Compiles",
    "weighted": "fewstep.actors.judges:Weighted",
}
NOTHING_EXECUTED = "nothing-executed"
_DETAIL_CHARS = 200
_PATTERN_SECONDS = 1.0


class Judge(ABC):
    """One way to tell right answers from wrong ones."""

    @abstractmethod
    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        """The verdict on one answer; `task.program(answer)` is the whole program, where the task has one."""

    def unfit(self, task: Task) -> str:
        """Why answers to a task cannot be judged this way; "" = they can. Such tasks are left out, by name."""
        return ""


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge, by name, and its keyword arguments; crosses to the workers, which build it."""

    name: str = "tests"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Judge:
        """The judge. Raises ConfigError on an unknown name or option."""
        factory = resolve("verifier", self.name, JUDGES)
        try:
            judge: Judge = factory(**self.options)
        except TypeError as error:
            raise ConfigError(
                "verifier_options", dict(self.options), f"keyword arguments of {factory.__name__}", str(error)
            ) from error
        return judge


def found(passed: bool, detail: str = "", score: float | None = None) -> Verdict:
    """A verdict that no program's run stands behind."""
    own = float(passed) if score is None else score
    outcome: Outcome = "passed" if passed else "wrong_answer"
    return Verdict(outcome, own, (passed,), 0.0, NOTHING_EXECUTED, detail[:_DETAIL_CHARS])


class Tests(Judge):
    """The task's own check, in the sandbox."""

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        return sandbox.run(task.program(answer), task.check, task.timeout_s)

    def unfit(self, task: Task) -> str:
        return "has no check to execute" if task.check.kind == "reference" else ""


class ExactMatch(Judge):
    """The canonical solution, character by character.

    Args:
        strip: white space at both ends does not count.
        ignore_case: nor does case.
    """

    def __init__(self, strip: bool = True, ignore_case: bool = False) -> None:
        self._strip, self._ignore_case = strip, ignore_case

    def _plain(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text.casefold() if self._ignore_case else text

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        return found(self._plain(answer) == self._plain(task.canonical_solution))

    def unfit(self, task: Task) -> str:
        return "" if task.canonical_solution else "has no canonical_solution to match"


class RegularExpression(Judge):
    """A pattern that the answer must hold; the task's tag `pattern`, else the option.

    Args:
        pattern: of the `regex` library; empty = every task brings its own.
        whole: the answer, stripped, must match from end to end.
    """

    def __init__(self, pattern: str = "", whole: bool = False) -> None:
        self._pattern, self._whole = pattern, whole
        if pattern:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ConfigError("verifier_options.pattern", pattern, "a pattern", str(error)) from error

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        find = regex.fullmatch if self._whole else regex.search
        pattern = task.tags.get("pattern", self._pattern)
        try:
            # The text is a model's: a pattern that backtracks without end must not hold the worker.
            return found(find(pattern, answer.strip(), timeout=_PATTERN_SECONDS) is not None)
        except TimeoutError:
            return found(False, f"the pattern took longer than {_PATTERN_SECONDS:g} s")

    def unfit(self, task: Task) -> str:
        pattern = task.tags.get("pattern", self._pattern)
        if not pattern:
            return "has no tag `pattern`, and verifier_options has none"
        try:
            regex.compile(pattern)
        except regex.error as error:
            return f"its pattern: {error}"
        return ""


class JsonSchema(Judge):
    """An answer that is one JSON document and fits a schema; the task's tag `schema`, else the option's file.

    Args:
        schema: a file with a JSON schema; empty = every task brings its own as JSON text.
    """

    def __init__(self, schema: str = "") -> None:
        self._schema: Any = None
        if schema:
            try:
                self._schema = json.loads(Path(schema).read_text(encoding="utf-8"))
                validator_for(self._schema).check_schema(self._schema)
            except (OSError, ValueError, SchemaError) as error:
                raise ConfigError(
                    "verifier_options.schema", schema, "a file with a JSON schema", _first_line(error)
                ) from error

    def _own(self, task: Task) -> Any:
        return json.loads(task.tags["schema"]) if "schema" in task.tags else self._schema

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        schema = self._own(task)
        try:
            document = json.loads(answer)
            # An empty registry: a schema's $ref fetches nothing from anywhere.
            validator = validator_for(schema)(schema, registry=Registry())
            error = best_match(validator.iter_errors(document))
        except (ValueError, RecursionError) as problem:
            return found(False, f"not JSON: {_first_line(problem)}")
        return found(error is None, "" if error is None else f"{error.json_path}: {error.message}")

    def unfit(self, task: Task) -> str:
        try:
            schema = self._own(task)
            if schema is None:
                return "has no tag `schema`, and verifier_options has none"
            kind = validator_for(schema)
            kind.check_schema(schema)
            next(iter(kind(schema, registry=Registry()).iter_errors(None)), None)
        except (ValueError, SchemaError, Unresolvable) as error:
            return f"its schema: {_first_line(error)}"
        return ""


class Compiles(Judge):
    """A program that Python's compiler takes; it is compiled in the sandbox and never run."""

    _PROGRAM = "def f(source):\n    compile(source, 'answer', 'exec')\n    return True\n"

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        check = Check("call", "f", inputs=((task.program(answer),),), expected=(True,))
        return sandbox.run(self._PROGRAM, check, task.timeout_s)

    def unfit(self, task: Task) -> str:
        language = task.check.language
        return "" if language == "python" else f"{language}: only Python's compiler is asked"


class Weighted(Judge):
    """The weighted mean of other judges' scores.

    Args:
        parts: mappings with `verifier` and, if wanted, `weight` (1) and `options`.
        pass_score: the answer counts as right from this mean on.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]], pass_score: float = 1.0) -> None:
        known = {"verifier", "weight", "options"}
        for part in parts:
            if unknown := sorted(part.keys() - known):
                raise ConfigError(
                    f"verifier_options.parts.{unknown[0]}",
                    part[unknown[0]],
                    f"{sorted(known)}",
                    "remove it" + nearest(unknown[0], sorted(known)),
                )
        if not parts or any(float(part.get("weight", 1.0)) <= 0.0 for part in parts):
            raise ConfigError(
                "verifier_options.parts", list(parts), "at least one part, weights above 0", "correct them"
            )
        self._judges = [JudgeChoice(part["verifier"], part.get("options", {})).build() for part in parts]
        total = sum(float(part.get("weight", 1.0)) for part in parts)
        self._weights = [float(part.get("weight", 1.0)) / total for part in parts]
        self._pass_score = pass_score

    def judge(self, task: Task, answer: str, sandbox: Sandbox) -> Verdict:
        verdicts = [judge.judge(task, answer, sandbox) for judge in self._judges]
        score = sum(weight * one.score for weight, one in zip(self._weights, verdicts, strict=True))
        passed = score >= self._pass_score - 1e-9
        # The first part that failed says how; a failure of the sandbox itself is never a verdict on the answer.
        failed = [one for one in verdicts if not one.passed]
        broken = [one for one in failed if one.outcome == "sandbox_error"]
        outcome = broken[0].outcome if broken else "passed" if passed else failed[0].outcome
        return Verdict(
            outcome,
            0.0 if broken else score,
            tuple(one.passed for one in verdicts),
            sum(one.seconds for one in verdicts),
            next((one.isolation for one in verdicts if one.isolation != NOTHING_EXECUTED), NOTHING_EXECUTED),
            "; ".join(one.detail for one in failed if one.detail)[:_DETAIL_CHARS],
        )

    def unfit(self, task: Task) -> str:
        return next((reason for judge in self._judges if (reason := judge.unfit(task))), "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
