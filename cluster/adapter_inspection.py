"""`fewstep inspect ADAPTER`: what a LoRA adapter in PEFT's format changes, and in which model. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.platform.errors import UserError

if TYPE_CHECKING:
    from fewstep.kernels.model.adapter_folder import AdapterHeader


@dataclass(frozen=True)
class AdapterReport:
    """Everything that is said of an adapter.

    Attributes:
        scale: of the update B A; num_modules: linear layers that have one.
        parameters: of A and B together; file_bytes: of their file.
        base: the model it was trained on, as the adapter names it; base_digest: of its weights, if Fewstep trained it.
        fits: whether it does: "yes, ...", or why not, or that the base is not here.
    """

    folder: str
    rank: int
    alpha: float
    scale: float
    target_modules: tuple[str, ...]
    num_modules: int
    parameters: int
    file_bytes: int
    base: str
    base_digest: str
    fits: str


def inspect_adapter(folder: Path, tracking_uri: str) -> AdapterReport:
    """An adapter's settings and shapes, and whether they fit the model that it names.

    Raises:
        CheckpointError: it is no whole adapter, or has an option that is not followed here.
    """
    # Here and not above: parsing and --help stay instant without torch.
    from fewstep.kernels.model.adapter_folder import read_header

    header = read_header(folder)
    return AdapterReport(
        folder=str(folder),
        rank=header.rank,
        alpha=header.alpha,
        scale=header.scale,
        target_modules=header.target_modules,
        num_modules=len(header.modules),
        parameters=sum(prod(shape) for shape in header.shapes.values()),
        file_bytes=header.num_bytes,
        base=header.base,
        base_digest=header.base_digest,
        fits=_fits(header, tracking_uri),
    )


def adapter_lines(report: AdapterReport) -> list[tuple[str, str]]:
    """Names and values of what is printed; sizes in bytes."""
    digest = f", weights {report.base_digest[:16]}" if report.base_digest else ""
    return [
        ("folder", report.folder),
        ("adapter", f"LoRA of rank {report.rank}, alpha {report.alpha:g}: {report.scale:g} B A is added"),
        ("targets", f"{', '.join(report.target_modules)}; {report.num_modules} layers"),
        ("parameters", f"{report.parameters:,} in {report.file_bytes:,} bytes"),
        ("base", f"{report.base or 'not named'}{digest}"),
        ("fits", report.fits),
    ]


def _fits(header: AdapterHeader, tracking_uri: str) -> str:
    from fewstep.kernels.model.adapter_folder import check_adapter, check_base
    from fewstep.kernels.model.config import ModelConfig

    if not header.base:
        return "unknown: the adapter names no base model"
    try:
        base = _local_base(header.base, tracking_uri)
    except UserError as error:
        return f"unknown: {error}"
    if base is None or not (base / "config.json").is_file():
        return f"unknown: there is no model at {header.base} from here"
    try:
        check_adapter(header.folder, ModelConfig.load(base))
        check_base(header, base)
    except UserError as error:
        return f"no: {error}"
    return "yes, by names and shapes" + (", and by the digest of the weights" if header.base_digest else "")


def _local_base(base: str, tracking_uri: str) -> Path | None:
    """The folder of the model that an adapter names; None where it would have to be fetched first."""
    if base.startswith("models:/"):
        from fewstep.platform.mlflow_registry import find_local_model
        from fewstep.platform.mlflow_store import project_uri

        return find_local_model(base, project_uri(tracking_uri))
    if base == "embedded":
        from fewstep.kernels.model.checkpoint import embedded_model

        return embedded_model()
    return Path(base)
