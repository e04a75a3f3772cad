"""`fewstep serve --dry-run`: what would be started and the memory it would take; starts nothing and loads no weights."""

from __future__ import annotations

from pathlib import Path

import psutil

from fewstep.actors.serving.model_source import ModelSource
from fewstep.cluster.admission import check_access
from fewstep.cluster.deploy import ServeConfig
from fewstep.cluster.inspection import byte_text, inspect_model
from fewstep.cluster.served_models import check_sharding, model_sources
from fewstep.platform.errors import UserError
from fewstep.platform.ports import free_port


def show(config: ServeConfig) -> None:
    """Print the plan as comments, so that what a dry run prints stays a configuration file.

    What would be refused is a line of the plan: a dry run shows everything that is wrong, not the first of it.
    """
    for name, value in plan(config):
        print(f"# {name:<12}{value}")


def plan(config: ServeConfig) -> list[tuple[str, str]]:
    """Names and values of the plan, in the order of a start."""
    lines = _models(config)
    keys = f"keys of {config.keys}" if config.keys is not None else "anyone on this machine"
    limits = config.limits
    lines += [
        ("listens", f"{config.host}:{config.port or 'any free port'}, {keys}"),
        ("slots", f"{config.max_sequences} answers at once in each of {_replicas(config)} replicas"),
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


def _replicas(config: ServeConfig) -> str:
    least, most = config.least_replicas, config.most_replicas
    return str(least) if least == most else f"{least} to {most}"


def _models(config: ServeConfig) -> list[tuple[str, str]]:
    """A line or two for each model, then what a replica with all of them takes."""
    try:
        sources = model_sources(config.model, config.name, config.tracking_uri)
        found = [_model(config, source) for source in sources]
    except UserError as error:
        return [("refused", str(error))]
    num_bytes = config.most_replicas * sum(size for _, size in found)
    free = psutil.virtual_memory().available
    lines = [line for own, _ in found for line in own]
    lines += [
        ("replicas", f"{_replicas(config)} of {_ranks(config)}{config.cpus_per_replica:g} CPUs, each with every model"),
        ("together", f"{byte_text(num_bytes)} of {byte_text(free)} free, and about 0.5 GiB of libraries a {'replica' if config.tensor_parallel == 1 else 'rank'}"),
    ]  # fmt: skip
    if num_bytes > free:
        lines.append(("warning", "more than is free: fewer replicas, or a smaller cache_gib"))
    return lines


def _ranks(config: ServeConfig) -> str:
    if config.tensor_parallel == 1:
        return ""
    where = "on one node" if config.ranks_on == "one_node" else "on any nodes"
    return f"{config.tensor_parallel} ranks {where}, each of "


def _model(config: ServeConfig, source: ModelSource) -> tuple[list[tuple[str, str]], int]:
    """What it is, and the bytes it takes in one replica."""
    import torch

    from fewstep.actors.engine.cache import num_pages_for, page_bytes
    from fewstep.kernels.model.adapter_folder import check_adapter, check_base
    from fewstep.kernels.model.checkpoint import rank_parameters
    from fewstep.kernels.model.config import ModelConfig

    check_sharding(source, config.tensor_parallel)
    folder = Path(source.folder)
    report, model = inspect_model(folder), ModelConfig.load(folder)
    stored = report.stored_dtype if config.dtype == "saved" else config.dtype
    # A checkpoint of several types is computed in one; the widest is the safe guess.
    dtype = max(stored.split(" and "), key=lambda name: report.weight_bytes.get(name, 0))
    torch_dtype = getattr(torch, dtype)
    pages = num_pages_for(model, torch_dtype, torch.device("cpu"), config.max_sequences, config.cache_bytes)
    weights, cache = report.weight_bytes.get(dtype, report.file_bytes), pages * page_bytes(model, torch_dtype)
    if config.tensor_parallel > 1:
        itemsize = weights // report.parameters
        first, other = (rank_parameters(model, config.tensor_parallel, rank) * itemsize for rank in (0, 1))
        weights = first + (config.tensor_parallel - 1) * other
    lines = [
        ("model", f"{source.name}, {folder}: {report.family}, {report.parameters:,} parameters, {dtype}"),
        ("memory", f"a replica: {byte_text(weights)} of weights, {byte_text(cache)} for {pages:,} pages of keys and values"),
    ]  # fmt: skip
    if source.adapter:
        header = check_adapter(Path(source.adapter), model)
        check_base(header, folder)
        lines.insert(1, ("adapter", f"{source.adapter}: rank {header.rank}, merged into weights of its own"))
    if config.tensor_parallel > 1:
        share = byte_text(cache // config.tensor_parallel)
        lines.append(
            (
                "ranks",
                f"{config.tensor_parallel}: {byte_text(first)} of weights on the first, {byte_text(other)} on each other, {share} of keys and values on each",
            )
        )
    return lines, weights + cache
