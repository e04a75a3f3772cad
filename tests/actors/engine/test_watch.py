"""What a watched request shows of its canvas, against the plain loop; and that watching changes nothing else."""

from __future__ import annotations

import dataclasses
import random

import pytest
from tests.actors.engine.reference.loop import ROUNDING, Eyes, PlainResult
from tests.actors.engine.reference.models import MASK, engine_of, reference_model
from tests.actors.engine.reference.policy import candidate
from tests.actors.engine.reference.requests import draw_decisive, expected

from fewstep.actors.engine.canvas import BlockReport
from fewstep.actors.engine.engine import Engine
from fewstep.actors.engine.progress import Outcome, advance
from fewstep.actors.engine.request import CanvasView, Request, Update
from fewstep.actors.engine.scheduler import Sequence as Running
from fewstep.platform.records import DecodePolicy

pytestmark = pytest.mark.usefixtures("both_ways_to_step")

KINDS = ("block_causal", "bidirectional")


def updates_of(engine: Engine, requests: list[Request]) -> dict[str, list[Update]]:
    for request in requests:
        engine.add(request)
    found: dict[str, list[Update]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for update in engine.step():
            found[update.request_id].append(update)
    return found


def assert_view(view: CanvasView, request: Request, kind: str, plain: PlainResult) -> None:
    """The state is the plain loop's after that forward, the proposals are the plain candidates before it."""
    step, prompt = view.revision - 1, len(request.prompt_ids)
    before = plain.states[step]
    after = plain.states[step + 1] if step + 1 < len(plain.states) else plain.canvas
    assert list(view.before) == after[: view.start]
    changed = {position for position, *_ in plain.edits}
    tokens = [*request.prompt_ids, *before, *request.suffix_ids]
    model, size = reference_model(kind), request.policy.block_size or 8
    first = prompt + view.start
    if kind == "block_causal":
        first = first // size * size
    end = first + size if kind == "block_causal" else min(first + size, prompt + request.max_tokens)
    logits = Eyes(request).logits(model, tokens, first, end, 0, False)
    for index, (token, state) in enumerate(zip(view.ids, view.states, strict=True)):
        position = view.start + index
        if state == "provisional":
            assert after[position] == MASK
            plainly = candidate(logits[prompt + position], request.policy, prompt + position, step)
            assert token == plainly.token or plainly.margin < ROUNDING
        else:
            assert token == after[position] != MASK
            assert (state == "edited") <= (position in changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_views_are_the_plain_canvases_and_proposals(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = draw_decisive(rng, 4, kind, approximate=False)
    watched = [dataclasses.replace(request, watch=index > 0) for index, request in enumerate(requests)]
    found = updates_of(engine_of(kind=kind), watched)
    plain_updates = updates_of(engine_of(kind=kind), requests)
    assert all(update.canvas is None for update in found["0"])
    for request in requests[1:]:
        views = [update.canvas for update in found[request.request_id]]
        assert None not in views
        shown = [view for view in views if view is not None]
        plain = expected(request, kind)
        assert [view.revision for view in shown] == list(range(1, len(plain.states) + 1))
        for view in shown:
            assert_view(view, request, kind, plain)
        unwatched = [(update.text, update.num_new_tokens) for update in plain_updates[request.request_id]]
        watched_pieces = [(update.text, update.num_new_tokens) for update in found[request.request_id]]
        assert [piece for piece in watched_pieces if piece != ("", 0)] == [
            piece for piece in unwatched if piece != ("", 0)
        ]


def test_an_edited_token_is_shown_as_one() -> None:
    policy = DecodePolicy(threshold=0.2, edit_threshold=0.2)
    states = set()
    for seed in range(20):
        rng = random.Random(seed)
        prompt = tuple(rng.randrange(3, 20) for _ in range(5))
        request = Request("r", prompt, policy, 20, watch=True)
        engine = engine_of()
        updates = updates_of(engine, [request])["r"]
        trajectory = updates[-1].trajectory
        assert trajectory is not None
        views = [update.canvas for update in updates if update.canvas is not None]
        edits = {int(position) for position in trajectory.edit_position}
        edited = {
            view.start + index
            for view in views
            for index, state in enumerate(view.states)
            if state == "edited"
        }
        assert edited <= edits
        states |= edited
    assert states


def test_higher_priority_is_admitted_first_and_equals_in_order() -> None:
    engine = engine_of(max_sequences=1)
    policy = DecodePolicy(threshold=0.5)
    for name, priority in (("first", 0), ("low", -1), ("high", 1), ("second", 0), ("high too", 1)):
        engine.add(Request(name, (5, 6), policy, 3, priority=priority))
    ended = []
    while engine.has_work:
        ended += [update.request_id for update in engine.step() if update.last]
    assert ended == ["high", "high too", "first", "second", "low"]


@pytest.mark.parametrize("watch", [False, True])
def test_proposals_are_read_back_only_for_who_watches(monkeypatch: pytest.MonkeyPatch, watch: bool) -> None:
    seen: list[tuple[int, ...]] = []

    def note(sequence: Running, report: BlockReport, block_size: int) -> Outcome:
        seen.append(report.proposed)
        return advance(sequence, report, block_size)

    monkeypatch.setattr("fewstep.actors.engine.engine.advance", note)
    updates_of(engine_of(), [Request("r", (5, 6), DecodePolicy(threshold=0.5), 12, watch=watch)])
    assert seen
    assert all(bool(proposed) == watch for proposed in seen)
