"""Low-rank adapters (LoRA; Hu et al., 2106.09685): W x + s B A x with W frozen, and W + s B A to serve.

A and B are held by module of the *family's files*, because that is how PEFT's files name them: where a file keeps queries,
keys and values in one tensor, three of our projections share an A and each has its rows of B.

Shape legend: r rank, d inputs and n outputs of a module in the files; A [r, d], B [n, r], s = alpha / r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fewstep.kernels.confidence import keyed_uniform
from fewstep.kernels.model.checkpoint import own_shapes, source_shape
from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.model.families import Piece
from fewstep.kernels.model.lora_settings import LoraSettings, chosen_modules, mergeable_modules
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.rng import derive_seed, generator

# Names of PEFT's tensors behind the name of the module.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

Factors = Mapping[str, torch.Tensor]
"""A and B of every adapted module as MODULE.lora_A.weight and MODULE.lora_B.weight."""


class Lora(nn.Module):
    """The trained part of a model with an adapter; the model itself keeps its tensors, names and checksum.

    A begins as PEFT's does (uniform within 1 / sqrt(d), Kaiming's rule with a = sqrt(5)), B at zero, so that at first
    nothing changes.

    Args:
        config: of the model.
        settings: see LoraSettings.
    Raises:
        ConfigError: a target module that the family does not have.
    """

    def __init__(self, config: ModelConfig, settings: LoraSettings) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        self._pieces = chosen_modules(config, settings.target_modules)
        self._owners: list[tuple[nn.Module, Any]] = []
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        shapes = own_shapes(config)
        for module, parts in self._pieces.items():
            outputs, inputs = source_shape(parts, shapes)
            draws = generator("lora", settings.seed, module).uniform(-1.0, 1.0, (settings.rank, inputs))
            self.down[_key(module)] = nn.Parameter(torch.from_numpy(draws).float() * inputs**-0.5)
            self.up[_key(module)] = nn.Parameter(torch.zeros(outputs, settings.rank))
        self.key: torch.Tensor
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def attach(self, transformer: Transformer) -> None:
        """Freeze a model's own weights and add the update to its projections."""
        transformer.requires_grad_(False)
        shapes = own_shapes(self.config)
        added: dict[nn.Module, Any] = {}
        for number, (module, parts) in enumerate(self._pieces.items()):
            for piece in parts:
                name, _, leaf = piece.target.rpartition(".")
                owner = transformer.get_submodule(name)
                update = LowRank(self, module, number, _rows(piece, shapes))
                if piece.index is None:
                    added[owner] = update
                else:
                    added.setdefault(owner, {})[leaf, piece.index] = update
        self._owners = list(added.items())
        self._add()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The model as it was before, for the length of a block."""
        for owner, _ in self._owners:
            del owner.added  # the class has what a layer without an adapter has
        try:
            yield
        finally:
            self._add()

    def draw(self, *key: int) -> None:
        """Draw other masks of the dropout, a function of the settings' seed and this key, until the next call."""
        self.key.fill_(derive_seed("lora-dropout", self.settings.seed, *key))

    def factors(self) -> dict[str, torch.Tensor]:
        """A and B of every module, the parameters' own memory."""
        found = {}
        for module in self._pieces:
            found[module + DOWN] = self.down[_key(module)].detach()
            found[module + UP] = self.up[_key(module)].detach()
        return found

    def merged(self, state: Mapping[str, torch.Tensor], factors: Factors) -> dict[str, torch.Tensor]:
        """A model's tensors with the update in them. Those that it changes are new, the others are those of `state`."""
        changed = {piece.target for parts in self._pieces.values() for piece in parts}
        result = {name: tensor.clone() if name in changed else tensor for name, tensor in state.items()}
        merge_into(result, factors, self.config, self.settings.scale)
        return result

    def _add(self) -> None:
        for owner, update in self._owners:
            owner.added = update


class LowRank:
    """x [..., d] to s B A x [..., m] of one module, or of the rows of B that are one projection's.

    Not a module: A and B are registered once, in the Lora.

    Args:
        number: of the module, by which its dropout is told from the others'.
        rows: of B; None = all.
    """

    def __init__(self, lora: Lora, module: str, number: int, rows: slice | None) -> None:
        self._lora, self._key, self._number, self._rows = lora, _key(module), number, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        lora = self._lora
        if lora.settings.dropout and lora.training:
            x = dropped(x, lora.settings.dropout, lora.key, self._number)
        up = lora.up[self._key]
        own = up if self._rows is None else up[self._rows]
        return F.linear(F.linear(x, lora.down[self._key]) * lora.settings.scale, own)


def dropped(x: torch.Tensor, share: float, key: torch.Tensor, number: int) -> torch.Tensor:
    """x [..., d] with a share of its numbers at zero and the others scaled to the same mean (Srivastava et al., 2014).

    Which ones is a function of the key: a layer that runs again in the backward pass, and a resumed run, leave out the
    same ones.

    Args:
        key: int64 []; number: of the module.
    """
    rows = torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)
    columns = torch.arange(x.shape[-1], device=x.device)
    kept = keyed_uniform(key + number, rows, columns) >= share
    return x * (kept.to(x.dtype) / (1.0 - share))


def merge_into(
    state: Mapping[str, torch.Tensor], factors: Factors, config: ModelConfig, scale: float
) -> None:
    """W += s B A in a model's tensors, computed in float32 and rounded once to the type they have.

    Args:
        state: the transformer's tensors, changed where they lie.
        factors: of modules that the model has, shapes fitting (`adapter_folder.load_adapter` has checked).
    """
    shapes, modules = own_shapes(config), mergeable_modules(config)
    with torch.no_grad():
        for name in factors:
            module = name.removesuffix(DOWN)
            if module == name:
                continue
            delta = scale * (factors[module + UP].float() @ factors[name].float())
            for piece in modules[module]:
                target = state[piece.target] if piece.index is None else state[piece.target][piece.index]
                rows = _rows(piece, shapes)
                target.copy_(target.float() + (delta if rows is None else delta[rows]))


def _rows(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> slice | None:
    """The rows of the source that are the target."""
    if piece.first_row is None:
        return None
    return slice(piece.first_row, piece.first_row + shapes[piece.target][0])


def _key(module: str) -> str:
    # torch allows no dots in the name of a parameter.
    return module.replace(".", "/")
