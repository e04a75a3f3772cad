"""Which matrices a low-rank adapter changes, and how much; free of torch, so that the command line can read it fast."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families import Piece, family_of
from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError

ALL_LINEAR = "all-linear"

_LINEAR = re.compile(r"\.(self_attn\.[qkvo]_proj|mlp\.(shared\.|experts\.)?(gate|up|down)_proj)(\.weight)?")


def _in_a_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class LoraSettings(Config):
    """A low-rank adapter in place of full fine-tuning: y = W x + (alpha / rank) B A x, W frozen (Hu et al., 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_in_a_list), Field(min_length=1)] = (
        ALL_LINEAR,
    )
    """Linear layers by the ends of their names in the model's own files, as PEFT matches them (q_proj, self_attn.q_proj);
    all-linear = those of attention and of the MLPs, experts included, without head and router."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inputs of A that is left out in training."""
    seed: int = Field(default=0, ge=0)
    """Of A's first values and of the dropout."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def linear_modules(config: ModelConfig) -> dict[str, list[Piece]]:
    """The modules that an adapter may be trained on, by their names in the family's files."""
    return {name: parts for name, parts in _matrices(config).items() if _LINEAR.search(parts[0].target)}


def mergeable_modules(config: ModelConfig) -> dict[str, list[Piece]]:
    """The modules that an adapter from elsewhere may change: every matrix but the embedding."""
    found = _matrices(config)
    return {name: parts for name, parts in found.items() if parts[0].target != "embed_tokens.weight"}


def chosen_modules(config: ModelConfig, targets: Iterable[str]) -> dict[str, list[Piece]]:
    """The modules of `linear_modules` that `target_modules` names.

    Raises:
        ConfigError: a target that no module's name ends in; says which there are.
    """
    modules = linear_modules(config)
    chosen: dict[str, list[Piece]] = {}
    for target in targets:
        found = modules if target == ALL_LINEAR else {m: p for m, p in modules.items() if _ends(m, target)}
        if not found:
            raise ConfigError(
                "trainer.lora.target_modules",
                repr(target),
                f"{ALL_LINEAR}, or of a {config.family} model {', '.join(_last_names(modules))}",
                "name linear layers as the model's files do",
            )
        chosen |= found
    return {module: parts for module, parts in modules.items() if module in chosen}


def peft_targets(config: ModelConfig, modules: Iterable[str]) -> list[str]:
    """`target_modules` by which PEFT, which matches ends of names over the whole model, finds these modules and no others."""
    chosen, every = set(modules), _every_module(config)
    targets: list[str] = []
    for last in _last_names(chosen):
        same = {module for module in every if _ends(module, last)}
        targets += [last] if same <= chosen else sorted(same & chosen)
    return targets


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _last_names(modules: Iterable[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})


def _matrices(config: ModelConfig) -> dict[str, list[Piece]]:
    """Pieces of every weight with two axes, by module. A vector is told by its name: a norm's, or a bias."""
    modules: dict[str, list[Piece]] = {}
    for piece in family_of(config).pieces(config):
        module, _, kind = piece.source.rpartition(".")
        if kind == "weight" and not piece.target.endswith(("norm.weight", ".bias")):
            modules.setdefault(module, []).append(piece)
    return modules


def _every_module(config: ModelConfig) -> set[str]:
    return {piece.source.rpartition(".")[0] for piece in family_of(config).pieces(config)}
