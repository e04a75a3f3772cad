"""What follows attention in a layer: one gated MLP, or a mixture of many small ones.

Shape legend: T tokens, d hidden size, E experts, I an expert's inner size, k experts a token uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from fewstep.kernels.linear import Projection
from fewstep.kernels.model.config import ModelConfig, MoeConfig


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden_size, inner_size, bias)
        self.up_proj = Projection(hidden_size, inner_size, bias)
        self.down_proj = Projection(inner_size, hidden_size, bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + the MLP of x, both [..., d]."""
        return self.down_proj.plus(self.up_proj.times(x, self.gate_proj.swish(x)), residual)


class Router(nn.Module):
    """Which experts a token goes to, and with what weight (DeepSeek-V3, 2412.19437, equations 12 to 16)."""

    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        # A buffer: it balances load by a rule of its own, not by gradient.
        self.bias: torch.Tensor | None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert indices int64 [T, k] and weights float32 [T, k] of x [T, d]."""
        config = self.config
        # float32: at bf16 experts that score alike change places with the rounding.
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(-1)
        ranked = scores if self.bias is None else scores + self.bias
        if config.n_group > 1:
            ranked = ranked.masked_fill(~self._in_best_groups(ranked), float("-inf"))
        chosen = ranked.topk(config.num_experts_per_tok, dim=-1).indices
        weight = scores.gather(-1, chosen)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return chosen, weight * config.routed_scaling_factor

    def _in_best_groups(self, ranked: torch.Tensor) -> torch.Tensor:
        """bool [T, E]: the experts of the `topk_group` groups whose two best experts score highest together."""
        grouped = ranked.view(len(ranked), self.config.n_group, -1)
        score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = score.topk(self.config.topk_group, dim=-1).indices
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        return kept[..., None].expand_as(grouped).flatten(-2)


class Experts(nn.Module):
    """E gated MLPs, stacked so that a fused kernel can walk them.

    Attributes:
        added: by projection and expert, what is added to its product while an adapter is trained (`lora.py`).
    """

    added: Mapping[tuple[str, int], Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType({})

    def __init__(self, hidden_size: int, inner_size: int, num_experts: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))

    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Rows [n, d] sorted by expert, `sizes[e]` of them for expert e; the experts' outputs [n, d]."""
        weights = zip(torch.split(x, sizes), self.gate_proj, self.up_proj, self.down_proj, strict=True)
        parts = []
        for expert, (rows, gate, up, down) in enumerate(weights):
            if len(rows):
                inner = F.silu(self._product("gate_proj", expert, rows, gate))
                inner = inner * self._product("up_proj", expert, rows, up)
                parts.append(self._product("down_proj", expert, inner, down))
        return torch.cat(parts)

    def _product(self, name: str, expert: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, weight)
        update = self.added.get((name, expert))
        return out if update is None else out + update(x)


class MixtureOfExperts(nn.Module):
    """Routed experts plus, in some models, a shared one that every token passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = Router(config.hidden_size, moe)
        self.experts = Experts(config.hidden_size, moe.moe_intermediate_size, moe.num_experts)
        self.shared = (
            MLP(config.hidden_size, moe.moe_intermediate_size * moe.num_shared_experts, bias=False)
            if moe.num_shared_experts
            else None
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + the mixture of x, both [..., d]."""
        rows = x.flatten(0, -2)
        chosen, weight = self.router(rows)
        used = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        sizes = torch.bincount(chosen.flatten(), minlength=self.router.config.num_experts).tolist()
        outputs = self.experts(rows[order // used], sizes)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        each = outputs[back].view(len(rows), used, -1).float()
        mixed: torch.Tensor = (each * weight[..., None]).sum(1).to(x.dtype).view_as(x)
        if self.shared is not None:
            mixed = self.shared(x, mixed)
        return residual + mixed
