"""The card of an exported model: what it is, how it came to be, how fast and good it was measured, what it cannot do.

Every number is from the records of the jobs; what no job recorded is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.pipelines.frontier_table import render_table
from fewstep.pipelines.lineage import Stage
from fewstep.platform.records import FrontierPoint

_ON_TEXTS = ("pretrain", "distill")


def model_card(
    name: str,
    config: ModelConfig,
    num_parameters: int,
    digest: str,
    stages: Sequence[Stage],
    licence: str = "",
    merged: str = "",
) -> str:
    """README.md of a model folder.

    Args:
        digest: of the weights.
        stages: newest first, as `stages_of` gives them.
        licence: identifier for the header; "" = none.
        merged: a sentence about an adapter in the weights; "" = there is none.
    """
    header = ["---", *([f"license: {licence}"] if licence else []), "pipeline_tag: text-generation",
              "tags: [diffusion-language-model, fewstep]", "---", ""]  # fmt: skip
    sections = [
        _what(name, config, num_parameters, digest),
        _use(name),
        _data(stages),
        _stages(stages) + (f"\n\n{merged}" if merged else ""),
        _frontier(stages),
        _limits(config, stages),
    ]
    return "\n".join(header) + "\n\n".join(sections) + "\n"


def _what(name: str, config: ModelConfig, num_parameters: int, digest: str) -> str:
    kind = {
        "block_causal": f"a block-diffusion language model, {config.block_size} positions denoised together",
        "bidirectional": "a bidirectional diffusion language model",
        "causal": "an autoregressive language model",
    }[config.attention_kind]
    return (
        f"# {name}\n\n{kind[0].upper()}{kind[1:]}: {num_parameters:,} parameters, format of the {config.family} family,"
        f" vocabulary of {config.vocab_size:,}, context of {config.max_position_embeddings:,} positions, weights stored as"
        f" {config.torch_dtype}.\n\nSHA-256 of the weights: `{digest}`."
    )


def _use(name: str) -> str:
    return (
        f'## Use\n\n```sh\nfewstep generate --model {name} --prompt "..."   # this folder\n'
        f"fewstep serve --model {name}\n```"
    )


def _data(stages: Sequence[Stage]) -> str:
    lines = []
    for stage in reversed(stages):
        if stage.kind in _ON_TEXTS and stage.corpus:
            corpus = stage.corpus
            lines.append(
                f"- {stage.folder.name}: {corpus['num_documents']:,} documents, {corpus['num_tokens']:,} tokens"
                f" ({corpus['num_bad_rows']:,} bad rows left out), digest `{corpus['digest'][:16]}`"
            )
        elif stage.kind in _ON_TEXTS and not stage.config.get("data"):
            lines.append(
                f"- {stage.folder.name}: generated pairs of Fewstep's embedded family of list functions"
            )
        elif stage.kind in _ON_TEXTS:
            lines.append(
                f"- {stage.folder.name}: a prepared corpus that is no longer at {stage.config['data']}"
            )
        elif stage.kind == "refine":
            lines.append(f"- {stage.folder.name}: the model's own answers, judged by running them")
    return "## Data\n\n" + ("\n".join(lines) or "Unknown: no record of a job lies beside the model.")


def _stages(stages: Sequence[Stage]) -> str:
    lines = [f"{number}. {_stage(stage)}" for number, stage in enumerate(reversed(stages), start=1)]
    earliest = stages[-1].source if stages else ""
    if earliest:
        lines.insert(0, f"It began as `{earliest}`.\n")
    return "## Stages\n\n" + ("\n".join(lines) or "Unknown: no record of a job lies beside the model.")


def _stage(stage: Stage) -> str:
    if stage.kind == "convert":
        mask, record = stage.conversion["mask"], stage.conversion
        return (
            f"**convert**: from {record['source_family']} to {record['family']}, block size {record['block_size']}, mask"
            f" token `{mask['text']}` ({mask['found']}); source digest `{record['source_digest'][:16]}`"
        )
    config, last = stage.config, stage.last_metrics()
    if stage.kind == "pretrain":
        phases = ", ".join(f"{phase['block_size']} for {phase['share']:.0%}" for phase in config["phases"])
        end = f"; last {last['nll_per_token']:.4f} nats per masked token" if "nll_per_token" in last else ""
        return (
            f"**pretrain**: {config['steps']} steps of {config['batch_size']} samples, block sizes {phases}; edits in the"
            f" last {config['edit_share']:.0%}; seed {config['seed']}{_lora(config)}{end}"
        )
    if stage.kind == "distill":
        pool = config["pool"]
        return (
            f"**distill**: {config['steps']} steps of {config['batch_size']} orders of opening, the likeliest"
            f" {pool['keep_share']:.0%} of {pool['num_orders']} for each of {pool['num_samples']} texts; seed {config['seed']}{_lora(config)}"
        )
    report: Mapping[str, Any] = stage.record.report if stage.record is not None else {}
    steps = report.get("steps", config["steps"])
    return f"**refine**: {steps} on-policy steps, objective `{config['objective']}`, seed {config['seed']}{_lora(config)}"


def _lora(config: Mapping[str, Any]) -> str:
    lora = config.get("trainer", {}).get("lora")
    if not lora:
        return ""
    return f"; a LoRA adapter of rank {lora['rank']} on {', '.join(lora['target_modules'])}"


def _frontier(stages: Sequence[Stage]) -> str:
    measured = stages[0].record if stages else None
    points: list[FrontierPoint] = measured.final_frontier() if measured is not None else []
    if measured is None or not points:
        return "## Speed and quality\n\nNot measured by the job that made it. `fewstep evaluate` measures it."
    rows = [["policy", "pass@1", "forwards per answer", "tokens per forward", "tokens/s"]]
    rows += [
        [point.policy.label(), f"{point.pass_at_1:.3f}", f"{point.forwards_per_answer:.2f}",
         f"{point.tokens_per_forward:.2f}", f"{point.tokens_per_second:.0f}"]
        for point in points
    ]  # fmt: skip
    machine = measured.report.get("machine", {})
    where = f" {machine['cpu']}, {machine['cores']} cores." if machine else ""
    text = f"\n\n{measured.report['text']}" if "text" in measured.report else ""
    return (
        f"## Speed and quality\n\n{points[0].num_tasks} held-out tasks, one answer each.{where}\n\n"
        + render_table(rows, "markdown")
        + text
    )


def _on_family(stage: Stage) -> bool:
    """Whether a stage trained, or was judged, on the embedded family of tasks."""
    if stage.kind == "convert":
        return False
    if stage.kind != "refine":
        return not stage.config.get("data")
    tasks = stage.config.get("tasks") or "family"
    return (tasks if isinstance(tasks, str) else tasks["name"]) == "family"


def _limits(config: ModelConfig, stages: Sequence[Stage]) -> str:
    lines = [f"- At most {config.max_position_embeddings:,} positions, prompt and answer together."]
    if config.attention_kind == "block_causal":
        lines.append(
            f"- Trained at block size {config.block_size}; another one at inference is not what it has learned."
        )
    if any(_on_family(stage) for stage in stages):
        lines.append(
            "- Judged, or trained, on one family of small list functions; it says nothing of other tasks."
        )
    if stages and stages[0].kind == "convert":
        lines.append("- Converted and not trained since: it has not learned to denoise.")
    if config.family != "fewstep":
        lines.append(
            "- The folder holds weights, configuration and tokenizer of a public format, not that format's modelling code."
        )
    lines.append("- Nothing was done about harmful, biased or licensed content in what it writes.")
    return "## Limits\n\n" + "\n".join(lines)
