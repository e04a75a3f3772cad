"""`fewstep inspect ADAPTER`: what a LoRA adapter in PEFT's format changes, and in which model. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from fewstep.platform.errors import UserError


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
        fits=_fits(folder, header.base, tracking_uri),
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


def _fits(folder: Path, base: str, tracking_uri: str) -> str:
    from fewstep.kernels.model.adapter_folder import check_adapter
    from fewstep.kernels.model.checkpoint import embedded_model
    from fewstep.kernels.model.config import ModelConfig
    from fewstep.pipelines.models import model_folder

    if not base:
        return "unknown: the adapter names no base model"
    try:
        found = embedded_model() if base == "embedded" else model_folder(base, tracking_uri)
        if not (found / "config.json").is_file():
            return f"unknown: there is no model at {base} from here"
        check_adapter(folder, ModelConfig.load(found))
    except UserError as error:
        return f"no: {error}"
    return "yes, by names and shapes"
