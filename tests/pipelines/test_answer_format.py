"""What of a completion is the answer: stop rules, extraction, and that nothing needed is taken away."""

from __future__ import annotations

import pytest

from fewstep.pipelines.tasks.answer_format import (
    CHAT,
    FENCED,
    JSON,
    LANGUAGE,
    PYTHON,
    braces,
    code_block,
    json_answer,
    python_continuation,
    ruby,
)
from fewstep.platform.records import Check, Task

PROMPT = 'def f(x):\n    """Twice."""\n'


def task(prompt: str = PROMPT, language: str = "python", tests: str = "", header: str | None = None) -> Task:
    return Task("t", prompt, Check("source", "f", test_code=tests, language=language), header=header)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("    return 2 * x\n", "    return 2 * x\n"),
        ("    return 2 * x\n\nprint(f(3))\n", "    return 2 * x\n\n"),
        ("    return 2 * x\n\nf(3)\nassert f(3) == 6\n", "    return 2 * x\n\n"),
        (
            "    return g(x)\n\ndef g(x):\n    return 2 * x\n",
            "    return g(x)\n\ndef g(x):\n    return 2 * x\n",
        ),
        ("    return g(x)\n\ng = lambda x: 2 * x\n", "    return g(x)\n\ng = lambda x: 2 * x\n"),
        ("    return 2 * x\n\ndef g(x:\n    ret", "    return 2 * x\n\n"),
        ("    return 2 * x\n\nThis doubles the number.\n", "    return 2 * x\n\n"),
        ("    return 2 * x\n```\nThat is it.\n", "    return 2 * x\n"),
        # What is wrong inside the function stays: it is the answer.
        ("    return 2 *\n", "    return 2 *\n"),
        ("    if x:\n        return 2 * x\n    retur", "    if x:\n        return 2 * x\n    retur"),
        ("\0", "\0"),
        ("", ""),
    ],
)
def test_python_is_cut_behind_the_last_definition(text: str, answer: str) -> None:
    assert python_continuation(task(), text) == answer


def test_a_header_stands_in_for_the_prompt() -> None:
    assert (
        python_continuation(task(prompt="Say f.", header=""), "def f(x):\n    return x\nf(1)\n")
        == "def f(x):\n    return x\n"
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Here:\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x\n"),
        ("```\nimport os\n```\nand\n```py\ndef f(x): return x\n```", "def f(x): return x\n"),
        ("```python\ndef f(x):\n    return x\n", "def f(x):\n    return x\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x\n"),
        ("def f(x):\n    return x\n```\nExplanation", "def f(x):\n    return x\n"),
    ],
)
def test_chat_answers_give_their_code_block(text: str, answer: str) -> None:
    assert code_block(task(), text) == answer


def test_a_fence_that_the_prompt_opened_ends_the_answer() -> None:
    opened = task(prompt="Write f.\n\n```python\n")
    assert (
        code_block(opened, "def f(x):\n    return x\n```\nOr:\n```python\nf = 1\n```")
        == "def f(x):\n    return x\n"
    )
    assert FENCED.stop(opened) == ("\n```",)
    assert CHAT.stop(opened) == ()


JAVA = "import java.util.*;\n\nclass A {\n    static int f(int x) {\n"
SCALA_TESTS = '    assert(f(1) == 1, "x")\n}\n'


@pytest.mark.parametrize(
    ("language", "prompt", "tests", "text", "answer"),
    [
        ("javascript", "function f(x) {\n", "", "  return x;\n}\nfunction g() {}", "  return x;\n}"),
        ("javascript", "function f(x) {\n", "", "  return x;", "  return x;\n}\n"),
        (
            "javascript",
            "function f(x) {\n",
            "",
            "  return '}' + \"{\" + `}`; // }\n}\nf()",
            "  return '}' + \"{\" + `}`; // }\n}",
        ),
        (
            "javascript",
            "function f(x) {\n",
            "",
            '  return x.replace(/"/g, "");\n}',
            '  return x.replace(/"/g, "");\n}',
        ),
        (
            "java",
            JAVA,
            "class Main { }",
            "        return x;\n    }\n}\nclass B {}",
            "        return x;\n    }\n}",
        ),
        ("java", JAVA, "class Main { }", "        return x;", "        return x;\n}\n}\n"),
        (
            "scala",
            "object Main extends App {\n  def f(x : Int) : Int = {\n",
            SCALA_TESTS,
            "    x\n  }\n  println(1)",
            "    x\n  }",
        ),
        ("perl", "sub f {\n", "", "  return $#{$_[0]}; # }\n}\nprint 1;", "  return $#{$_[0]}; # }\n}"),
        (
            "cpp",
            "int f(int x) {\n",
            "int main() { return 0; }",
            "  /* } */ return x;\n}\nint main() {}",
            "  /* } */ return x;\n}",
        ),
    ],
)
def test_braces_end_the_function_and_are_put_back(
    language: str, prompt: str, tests: str, text: str, answer: str
) -> None:
    assert braces(task(prompt, language, tests), text) == answer


def test_ruby_ends_with_its_line() -> None:
    assert ruby(task("def f(x)\n", "ruby"), "  x\nend\nputs f(1)") == "  x\nend"
    assert (
        ruby(task("def f(x)\n", "ruby"), "  x.map do |y|\n    y\n  end")
        == "  x.map do |y|\n    y\n  end\nend\n"
    )


@pytest.mark.parametrize(
    ("language", "stop"),
    [("javascript", "\n}"), ("java", "\n    }\n"), ("ruby", "\nend"), ("python", "\nclass ")],
)
def test_a_language_stops_behind_its_function(language: str, stop: str) -> None:
    assert stop in LANGUAGE.stop(task(language=language))
    assert stop in PYTHON.stop(task()) or language != "python"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('The answer is {"a": [1, 2]}.', '{"a": [1, 2]}'),
        ('First [1], no: "x"', '"x"'),
        ("So it is 42", "42"),
        ("```json\n[true, null]\n```", "[true, null]"),
    ],
)
def test_the_last_json_value_is_the_answer(text: str, value: str) -> None:
    program = JSON.read(task(), text)
    compile(program, "program.py", "exec")
    assert f"return json.loads({value!r})" in program


def test_no_json_is_no_program() -> None:
    assert json_answer(task(), "I do not know") == "I do not know"
