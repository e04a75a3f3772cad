"""CodeI/O (Li et al. 2025, 2502.07316): given a function, predict its output, or an input that leads to an output.

The functions come with the package `reasoning-gym` (or a file of its form). They were written by a model, so they run in
the sandbox and nowhere else: once here, with inputs of their own generator, to make the question; and, for an input
prediction, again at the verdict, since any input with the right output is right.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from fewstep.actors.sandbox.sandbox import Sandbox
from fewstep.pipelines.tasks.answer_format import JSON
from fewstep.pipelines.tasks.benchmark import (
    BadRow,
    Benchmark,
    Row,
    find_file,
    make_tasks,
    read_rows,
    text_of,
)
from fewstep.platform.errors import ResourceError
from fewstep.platform.records import Check, Task
from fewstep.platform.rng import derive_seed

FILES = ("codeio.jsonl.gz", "codeio-hq.jsonl.gz", "codeio*.jsonl")
TIMEOUT_S = 10.0
_SHOWN_CHARS = 4000
_MAKE = """

def make_pair(seed):
    import json
    from random import Random
    given = generate_inputs(Random(seed))
    kept = json.loads(json.dumps(given))
    return [kept, json.loads(json.dumps(main_solution(**given)))]
"""
_OUTPUT_CHECK = """\
import json

EXPECTED = json.loads({expected!r})


def check(candidate):
    assert candidate() == EXPECTED
"""
_INPUT_CHECK = """\
import json

{code}

EXPECTED = json.loads({expected!r})


def check(candidate):
    assert json.loads(json.dumps(main_solution(**candidate()))) == EXPECTED
"""


def load(
    path: Path | None,
    variant: Literal["output", "input"],
    seed: int,
    *,
    chat: bool = False,
    limit: int | None = None,
) -> Benchmark:
    """Questions about the rows' functions.

    Args:
        path: a file of the package's form; None = the package's own.
        variant: predict the output, or an input.
        seed: of the inputs.
    Raises:
        ResourceError: no path, and the package is not installed.
        TaskFileError: a file that cannot be used.
    """
    rows = read_rows([package_file() if path is None else find_file(path, FILES, "codeio")])
    numbered = iter(range(len(rows.rows)))
    with Sandbox() as sandbox:
        tasks, excluded = make_tasks(
            rows, lambda row: _task(sandbox, next(numbered), row, variant, seed), limit
        )
    return Benchmark(f"codeio_{variant}", tasks, rows.source, rows.digest, JSON, excluded, chat=chat)


def package_file() -> Path:
    """The file inside the package `reasoning-gym`. Raises ResourceError where it is not installed."""
    found = importlib.util.find_spec("reasoning_gym")
    if found is None or not found.submodule_search_locations:
        raise ResourceError(
            "reasoning-gym", "not installed", "version 0.1.25", "pip install 'fewstep[test]', or set path"
        )
    return Path(found.submodule_search_locations[0]) / "data" / "codeio.jsonl.gz"


def _task(sandbox: Sandbox, number: int, row: Row, variant: str, seed: int) -> Task:
    code, generator = text_of(row, "code_sample"), text_of(row, "input_generator")
    # The package runs a row with this name in scope: generators annotate their argument with it.
    program = f"from random import Random\n\n{code}\n\n{generator}\n{_MAKE}"
    arguments = (derive_seed("codeio", seed, number) & 0x7FFFFFFF,)
    # Twice, in two processes: a function that throws dice has no right answer.
    first, second = (sandbox.values(program, "make_pair", [arguments], TIMEOUT_S) for _ in range(2))
    if isinstance(first, str):
        raise BadRow(f"its own code fails: {first}")
    if first != second:
        raise BadRow("its own code answers differently every time")
    given, result = first[0]
    if not isinstance(given, dict) or not given:
        raise BadRow("its generator makes no named inputs")
    shown = result if variant == "input" else given
    if len(json.dumps(shown)) > _SHOWN_CHARS:
        raise BadRow(f"its example is longer than {_SHOWN_CHARS} characters")
    expected = json.dumps(result)
    tests = _OUTPUT_CHECK if variant == "output" else _INPUT_CHECK
    return Task(
        task_id=f"codeio/{number}",
        prompt=_prompt(row, code, shown, variant),
        check=Check("script", "answer", test_code=tests.format(code=code, expected=expected)),
        timeout_s=TIMEOUT_S,
        canonical_solution=json.dumps(result if variant == "output" else given),
        tags={"family": "codeio"},
        header="",
    )


def _prompt(row: Row, code: str, shown: Any, variant: str) -> str:
    what = "this output" if variant == "input" else "this input"
    ask = (
        "Give one input that leads to it, as a JSON object with the parameters' names."
        if variant == "input"
        else "Give the output as one JSON value."
    )
    return (
        f"### Task\n{text_of(row, 'task_description').strip()}\n\n### Inputs and outputs\n"
        f"{text_of(row, 'input_output_spec').strip()}\n\n### Code\n```python\n{code.strip()}\n```\n\n"
        f"For {what}:\n\n{json.dumps(shown)}\n\n{ask}\n\n### Answer\n"
    )
