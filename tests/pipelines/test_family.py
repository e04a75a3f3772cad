"""The embedded task family: its meaning, its split, its vocabulary."""

from __future__ import annotations

import itertools
import random

import pytest

from fewstep.pipelines.tasks.family import (
    Specification,
    draw_pair,
    draw_specification,
    render_body,
    specifications,
    tasks,
)
from fewstep.pipelines.tasks.vocabulary import EOS, MASK, build_tokenizer, encode_pair
from fewstep.platform.rng import generator


def _answers(program: str, inputs: list[list[int]]) -> list[object]:
    scope: dict[str, object] = {}
    exec(program, scope)  # noqa: S102  (our own renderer's text)
    return [scope["f"](list(xs)) for xs in inputs]  # type: ignore[operator]


def test_every_spelling_of_a_specification_computes_its_meaning() -> None:
    draws = generator("test-spellings")
    for specification in itertools.islice(specifications(3, held_out=False), 150):
        inputs = specification.hidden_inputs()
        expected = [specification.evaluate(xs) for xs in inputs]
        for _ in range(4):
            body = render_body(specification, draws)
            assert _answers(specification.prompt + body, inputs) == expected, body


def test_a_specification_has_many_right_bodies() -> None:
    draws = generator("test-many")
    specification = Specification.parse("keep odd; add 3; sum")
    assert len({render_body(specification, draws) for _ in range(300)}) > 200


def test_sides_of_the_split_are_disjoint_and_large() -> None:
    held_out = {s.text for s in itertools.islice(specifications(0, held_out=True), 500)}
    training = {s.text for s in itertools.islice(specifications(0, held_out=False), 20_000)}
    assert len(held_out) == 500
    assert len(training) == 20_000
    assert not held_out & training


def test_training_pairs_never_come_from_the_held_out_side() -> None:
    draws = generator("test-pairs")
    for _ in range(300):
        prompt, _ = draw_pair(draws)
        text = prompt.split('"""')[1]
        assert not Specification.parse(text).held_out


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("add 4; sum", "add 3; sum"),
        ("keep above 5; count", "keep above 6; count"),
        ("keep below 8; add 2; largest", "keep below 9; add 2; largest"),
        ("keep even; list", "keep odd; list"),
        ("multiply by 3; smallest", "multiply by 2; smallest"),
        ("square; add 2; sum", "add 2; square; sum"),
    ],
)
def test_hidden_inputs_tell_near_misses_apart(wrong: str, text: str) -> None:
    right = Specification.parse(text)
    inputs = right.hidden_inputs()
    assert [Specification.parse(wrong).evaluate(xs) for xs in inputs] != [right.evaluate(xs) for xs in inputs]


def test_no_constant_passes_a_task() -> None:
    for task in tasks(100, 0, held_out=True):
        assert len({repr(value) for value in task.check.expected}) >= 6


def test_tasks_are_the_same_on_every_call() -> None:
    assert tasks(20, 5, held_out=True) == tasks(20, 5, held_out=True)


def test_text_round_trips_through_the_vocabulary() -> None:
    tokenizer, draws = build_tokenizer(), generator("test-round-trip")
    for _ in range(200):
        specification = draw_specification(draws)
        text = specification.prompt + render_body(specification, draws)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode(tokenizer.encode("naïve 東京\t{x}  %").ids) == "naïve 東京\t{x}  %"


def test_a_known_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode("\n    return sorted(a)").tokens == ["ĊĠĠĠĠ", "return", "Ġsorted", "(", "a", ")"]
    assert tokenizer.token_to_id(MASK) == tokenizer.encode("<|mask|>").ids[0]


def test_pairs_fit_the_completion_budget() -> None:
    tokenizer, draws = build_tokenizer(), generator("test-lengths")
    for _ in range(2000):
        ids, num_prompt = encode_pair(tokenizer, *draw_pair(draws))
        assert ids[-1] == tokenizer.token_to_id(EOS)
        assert len(ids) - num_prompt <= 64


def test_drawing_never_touches_the_global_generator() -> None:
    random.seed(0)
    before = random.getstate()
    tasks(5, 1, held_out=False)
    assert random.getstate() == before
