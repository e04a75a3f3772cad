"""An evaluated frontier as a table: every policy with its interval."""

from __future__ import annotations

from fewstep.pipelines.evaluation_summary import FrontierSummary, PolicySummary
from fewstep.pipelines.frontier_table import TableStyle, render_table


def summary_table(frontier: FrontierSummary, first_test: str = "", style: TableStyle = "plain") -> str:
    """One frontier, a row per policy; `*` marks the cheapest at the bar, `(d)` a dominated one.

    Args:
        first_test: name of a score of its own within pass@1, such as EvalPlus' `base`; "" = there is none.
    """
    ks = sorted(frontier.policies[0].passes)
    header = ["policy", *(f"pass@{k}" for k in ks), "95% interval"]
    header += [f"{first_test} pass@1"] if first_test else []
    header += ["forwards", "TPF", "tokens/s"]
    rows = [_cells(frontier, one, ks, bool(first_test)) for one in frontier.policies]
    note = (
        f"Forwards per answer, TPF = tokens per forward, AUP {frontier.aup:.1f}; {frontier.points[0].num_tasks} tasks.\n"
        f"Marked * is the cheapest policy at pass@1 of {frontier.bar:.3f} or better: "
        f"{frontier.speedup:.2f}x fewer forwards than one token per step. (d) is dominated."
    )
    return render_table([header, *rows], style) + "\n\n" + note


def _cells(frontier: FrontierSummary, one: PolicySummary, ks: list[int], first: bool) -> list[str]:
    passed, point = one.passes[1], one.point
    base = [f"{one.first_test.value:.3f}" if one.first_test is not None else "-"] if first else []
    return [
        point.policy.label() + (" (d)" if one.dominated else ""),
        *(f"{one.passes[k].value:.3f}" for k in ks),
        f"{passed.low:.3f}-{passed.high:.3f}",
        *base,
        f"{point.forwards_per_answer:.2f}{' *' if one is frontier.cheapest else ''}",
        f"{point.tokens_per_forward:.2f}",
        f"{point.tokens_per_second:.0f}",
    ]
