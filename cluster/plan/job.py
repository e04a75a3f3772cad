"""`fewstep plan`: answers before anything is rented."""

from __future__ import annotations

import json
import sys

from fewstep.cluster.plan.bottleneck import scales
from fewstep.cluster.plan.devices import DEVICES
from fewstep.cluster.plan.refine_ratio import best_ratio
from fewstep.cluster.plan.report import Plan
from fewstep.cluster.plan.settings import PlanConfig, PlannedModel
from fewstep.cluster.plan.sizing import Size, all_sizes, cheapest, size_for
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.config import render_config


def run(config: PlanConfig) -> None:
    """Plans, prints the page, and writes report.json, report.md, the figures and the resolved configuration.

    Raises:
        CheckpointError: `model.folder` is no model.
    """
    plan = make_plan(config)
    write_plan(plan)
    print(plan.as_markdown())
    print(f"written to {config.out}")


def make_plan(config: PlanConfig) -> Plan:
    """Every answer; progress goes to standard error.

    Raises:
        CheckpointError: `model.folder` is no model.
    """
    if config.model.folder:
        config = config.model_copy(update={"model": read_model(config.model)})
    pairs = all_sizes(config)
    sizes: list[Size] = []
    for index, (device, profile) in enumerate(pairs):
        _progress(f"{index + 1}/{len(pairs)} {device.name}, {profile.label()}")
        sizes.append(size_for(config, device, profile))
    best = cheapest(sizes)
    device = DEVICES[best.device if best else config.fleet.devices[0]]
    profile = best.profile if best else pairs[0][1]
    _progress("trainers and replicas")
    ratio = best_ratio(config, device, profile)
    _progress("large fleets")
    plan = Plan(config, tuple(sizes), ratio, device.name, tuple(scales(config)))
    _progress("")
    return plan


def write_plan(plan: Plan) -> None:
    """Files in `plan.config.out`, each whole or not at all."""
    # Late: the figures bring matplotlib.
    from fewstep.cluster.plan.figures import draw_cost, draw_ratio, draw_scale

    out = plan.config.out
    atomic_write_text(out / "config.yaml", render_config(plan.config))
    atomic_write_text(out / "report.json", json.dumps(plan.as_data(), indent=2) + "\n")
    pictures = ["cost.png", "scale.png"]
    draw_cost(out / "cost.png", plan.sizes)
    draw_scale(out / "scale.png", plan.scales)
    if plan.ratio is not None:
        draw_ratio(out / "ratio.png", plan.ratio)
        pictures.insert(1, "ratio.png")
    images = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    atomic_write_text(out / "report.md", f"{plan.as_markdown()}\n{images}\n")


def read_model(asked: PlannedModel) -> PlannedModel:
    """The sizes of a model folder; types of weights and cache stay as asked.

    Raises:
        CheckpointError: the folder is no model.
    """
    # Late: reading a folder brings torch.
    from fewstep.cluster.inspection import inspect_model
    from fewstep.kernels.model.config import ModelConfig
    from fewstep.pipelines.models import model_folder

    folder = model_folder("" if asked.folder == "embedded" else asked.folder, "")
    found, model = inspect_model(folder), ModelConfig.load(folder)
    experts = model.moe.num_experts if model.moe else 0
    chosen = model.moe.num_experts_per_tok if model.moe else 0
    idle = found.parameters - found.active_parameters
    return PlannedModel(
        folder=asked.folder,
        name=found.family if asked.name == PlannedModel().name else asked.name,
        parameters=found.parameters,
        active_parameters=found.active_parameters,
        expert_parameters=idle * experts / (experts - chosen) if experts > chosen else 0.0,
        num_hidden_layers=found.num_hidden_layers,
        hidden_size=found.hidden_size,
        num_attention_heads=found.num_attention_heads,
        num_key_value_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        vocab_size=found.vocab_size,
        num_experts=experts,
        num_experts_per_tok=chosen,
        weight_bytes_per_parameter=asked.weight_bytes_per_parameter,
        kv_bytes_per_number=asked.kv_bytes_per_number,
    )


def _progress(text: str) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
