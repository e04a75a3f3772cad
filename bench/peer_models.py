"""Other projects' modelling code, loaded from a checkout or from transformers, as a function from tokens to logits.

Needs an environment with transformers 4.57 (the peers' code predates 5); transformers' own classes work in 5 too.
Nothing of a peer is in this repository: `--peer` names a checkout.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

# (a model, tokens [1, R], visible bool [R, R]) -> logits [R, V]
Forward = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """Where a family's reference lives.

    Attributes:
        repository: what to clone and pass as `--peer`; "" = transformers itself.
        load: the checkout to the model's class.
        forward: one full forward.
    """

    repository: str
    load: Callable[[Path | None], Any]
    forward: Forward


def load_weights(peer: Peer, checkout: Path | None, folder: Path, dtype: torch.dtype) -> Any:
    """The peer's model with a folder's weights; a name it misses or does not know is an error, not a warning."""
    model, info = peer.load(checkout).from_pretrained(
        str(folder), torch_dtype=dtype, output_loading_info=True, local_files_only=True
    )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(f"the peer's names differ: {wrong}")
    return model.eval()


def _package(folder: Path, name: str) -> str:
    """A package of that name whose `__init__` is skipped: the peers' own import trainers and evaluators."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return name


def _llada(checkout: Path | None) -> Any:
    assert checkout is not None
    name = _package(checkout / "llada" / "model", "peer_llada")
    return importlib.import_module(f"{name}.modeling_llada").LLaDAModelLM


def _dream(checkout: Path | None) -> Any:
    assert checkout is not None
    name = _package(checkout / "dream" / "model", "peer_dream")
    module = importlib.import_module(f"{name}.modeling_dream")
    # Its from_pretrained also wants a generation configuration of its own kind; the base class loads weights only.
    module.DreamModel.from_pretrained = classmethod(module.PreTrainedModel.from_pretrained.__func__)
    return module.DreamModel


def _sdar(checkout: Path | None) -> Any:
    """SDAR's code imports GPU packages at the top; what of them a CPU forward calls is written out here."""
    assert checkout is not None
    name = _package(checkout / "training" / "model" / "SDAR-4B-Chat", "peer_sdar")

    def rms_norm_fn(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    layer_norm = types.ModuleType("flash_attn.ops.triton.layer_norm")
    layer_norm.rms_norm_fn = rms_norm_fn  # type: ignore[attr-defined]
    loss = types.ModuleType(f"{name}.fused_linear_diffusion_cross_entropy")
    loss.FusedLinearDiffusionCrossEntropyLoss = None  # type: ignore[attr-defined]
    parents = {
        part: types.ModuleType(part) for part in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton")
    }
    for part, module in parents.items():
        module.__spec__ = ModuleSpec(
            part, None
        )  # transformers looks for it to see whether the package is there
    sys.modules.update({**parents, layer_norm.__name__: layer_norm, loss.__name__: loss})
    import transformers.cache_utils
    import transformers.utils

    # Renamed or dropped since the code was written.
    for module, old, new in (
        (transformers.utils, "LossKwargs", transformers.utils.TransformersKwargs),
        (transformers.cache_utils, "SlidingWindowCache", type("SlidingWindowCache", (), {})),
    ):
        if not hasattr(module, old):
            setattr(module, old, new)
    return importlib.import_module(f"{name}.modeling_sdar").SDARForCausalLM


def _fast_dllm_v2(checkout: Path | None) -> Any:
    assert checkout is not None
    sys.path.insert(0, str(checkout / "v2"))
    original = checkout / "v2" / "modeling_ori.py"
    return importlib.import_module(
        "modeling_ori" if original.is_file() else "modeling"
    ).Fast_dLLM_QwenForCausalLM


def _llada2(checkout: Path | None) -> Any:
    assert checkout is not None
    name = _package(checkout / "dllm" / "pipelines" / "llada2" / "models", "peer_llada2")
    return importlib.import_module(f"{name}.modeling_llada2_moe").LLaDA2MoeModelLM


def _transformers(class_name: str) -> Callable[[Path | None], Any]:
    return lambda _checkout: getattr(importlib.import_module("transformers"), class_name)


def _unmasked(model: Any, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    assert visible.all()
    return model(tokens).logits[0]


def _dream_forward(model: Any, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    assert visible.all()
    return model(tokens, attention_mask="full").logits[0]


def _boolean_mask(model: Any, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return model(tokens, attention_mask=visible[None, None]).logits[0]


def _additive_mask(model: Any, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return model(tokens, attention_mask=mask[None, None]).logits[0]


def _own_block_mask(model: Any, tokens: torch.Tensor, _visible: torch.Tensor) -> torch.Tensor:
    return model(tokens, block_size=model.config.bd_size).logits[0]


def _causal(model: Any, tokens: torch.Tensor, _visible: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits[0]


PEERS: dict[str, Peer] = {
    "llada": Peer("NVlabs/Fast-dLLM", _llada, _unmasked),
    "dream": Peer("NVlabs/Fast-dLLM", _dream, _dream_forward),
    "sdar": Peer("JetAstra/SDAR", _sdar, _boolean_mask),
    "fast_dllm_v2": Peer("wangziyannb/Fast-dLLM", _fast_dllm_v2, _own_block_mask),
    "llada2": Peer("ZHZisZZ/dllm", _llada2, _additive_mask),
    # Its modelling code is on a model hub only; the architecture is Llama's and the mask is handed in.
    "stable_diffcoder": Peer("", _transformers("LlamaForCausalLM"), _additive_mask),
    "llama": Peer("", _transformers("LlamaForCausalLM"), _causal),
    "qwen2": Peer("", _transformers("Qwen2ForCausalLM"), _causal),
    "qwen3": Peer("", _transformers("Qwen3ForCausalLM"), _causal),
}
