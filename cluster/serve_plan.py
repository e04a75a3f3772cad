"""`fewstep serve --dry-run`: what would be started and the memory it would take; starts nothing and reads no weights."""

from __future__ import annotations

from fewstep.cluster.admission import check_access
from fewstep.cluster.deploy import ServeConfig, free_port
from fewstep.cluster.inspection import byte_text, inspect_model
from fewstep.platform.errors import UserError


def show(config: ServeConfig) -> None:
    """Print the plan as comments, so that what a dry run prints stays a configuration file.

    What would be refused is a line of the plan: a dry run shows everything that is wrong, not the first of it.
    """
    for name, value in plan(config):
        print(f"# {name:<12}{value}")


def plan(config: ServeConfig) -> list[tuple[str, str]]:
    """Names and values of the plan, in the order of a start."""
    lines = [*_model(config)]
    keys = f"keys of {config.keys}" if config.keys is not None else "anyone on this machine"
    limits = config.limits
    lines += [
        ("listens", f"{config.host}:{config.port or 'any free port'}, {keys}"),
        ("slots", f"{config.max_sequences} answers at once in each of {config.num_replicas} replicas"),
        ("queue", f"{limits.max_waiting} more answers wait in each, then 429"),
        ("deadline", f"{limits.request_seconds:g} s a request; {config.drain_seconds:g} s to drain"),
        (
            "log",
            f"{config.log.file or 'standard error'}, {'with' if config.log.prompts else 'without'} prompts",
        ),
    ]
    for check in (
        lambda: check_access(config.host, config.keys),
        lambda: free_port(config.host, config.port),
    ):
        try:
            check()
        except UserError as error:
            lines.append(("refused", str(error)))
    return lines


def _model(config: ServeConfig) -> list[tuple[str, str]]:
    import torch

    from fewstep.actors.engine.cache import num_pages_for, page_bytes
    from fewstep.kernels.model.config import ModelConfig
    from fewstep.pipelines.models import model_folder

    try:
        folder = model_folder(config.model, config.tracking_uri)
        report, model = inspect_model(folder), ModelConfig.load(folder)
    except UserError as error:
        return [("refused", str(error))]
    stored = report.stored_dtype if config.dtype == "saved" else config.dtype
    # A checkpoint of several types is computed in one; the widest is the safe guess.
    dtype = max(stored.split(" and "), key=lambda name: report.weight_bytes.get(name, 0))
    budget = None if config.cache_gib is None else int(config.cache_gib * 2**30)
    torch_dtype = getattr(torch, dtype)
    pages = num_pages_for(model, torch_dtype, torch.device("cpu"), config.max_sequences, budget)
    weights, cache = report.weight_bytes.get(dtype, report.file_bytes), pages * page_bytes(model, torch_dtype)
    total, free = config.num_replicas * (weights + cache), report.free_bytes
    lines = [
        ("model", f"{folder}: {report.family}, {report.parameters:,} parameters, {dtype}"),
        ("replicas", f"{config.num_replicas} of {config.cpus_per_replica:g} CPUs"),
        ("memory", f"a replica: {byte_text(weights)} of weights, {byte_text(cache)} for {pages:,} pages of keys and values"),
        ("together", f"{byte_text(total)} of {byte_text(free)} free, and about 0.5 GiB of libraries a replica"),
    ]  # fmt: skip
    if total > free:
        lines.append(("warning", "more than is free: fewer replicas, or a smaller cache_gib"))
    return lines
