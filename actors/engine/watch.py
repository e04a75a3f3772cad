"""What somebody who watches a request is shown of its canvas."""

from __future__ import annotations

from fewstep.actors.engine.canvas import BlockReport
from fewstep.actors.engine.request import CanvasView, TokenState
from fewstep.actors.engine.scheduler import Sequence


def view_of(sequence: Sequence, report: BlockReport, mask_token_id: int) -> CanvasView:
    """The live block after a forward, before the sequence has been moved on by it.

    Args:
        report: of that forward, with `proposed`.
    """
    prompt, live = len(sequence.request.prompt_ids), sequence.live
    first = max(live, prompt) - live
    end = max(first, min(sequence.live_end, sequence.end) - live)
    end = min(end, max(first, report.first_end))
    replaced = {edit.position + prompt - live for edit in sequence.edits}
    ids: list[int] = []
    states: list[TokenState] = []
    for index in range(first, end):
        token = report.tokens[index]
        if token == mask_token_id:
            ids.append(report.proposed[index])
            states.append("provisional")
        else:
            ids.append(token)
            states.append("edited" if index in replaced else "committed")
    before = tuple(sequence.ids[prompt : live + first])
    return CanvasView(sequence.step + 1, live + first - prompt, before, tuple(ids), tuple(states))
