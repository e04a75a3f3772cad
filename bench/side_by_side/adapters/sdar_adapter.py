"""SDAR's generate.py (JetAstra/SDAR): exact cache of finished blocks, a commit forward a block, one prompt at a time.

What this machine or greedy decoding needs is put around the peer at run time, its files stay as they are:

- its modelling file imports a type that transformers has renamed;
- it imports flash-attn and Triton, which need a GPU: torch's rms_norm and attention stand in;
- its sampler has no greedy mode (temperature 0 divides by zero, top-k 1 makes every confidence 1): argmax and its
  probability stand in, which is less work than the draw they replace.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
import transformers.utils
from adapter import Adapter, Message, checkout, serve, torch_dtype

MODELLING = ("training", "model", "SDAR-4B-Chat")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> torch.Tensor:
    """flash-attn's rms_norm_fn without a residual."""
    del bias
    return F.rms_norm(x, weight.shape, weight, eps)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float
) -> torch.Tensor:
    """flash-attn's flash_attn_func: [batch, rows, heads, dim] in and out."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def greedy(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and probability of every row, in the place of the peer's draw."""
    del temperature, top_k, top_p
    probability, token = logits.softmax(-1).max(-1)
    return token, probability


def stand_in(name: str, **members: object) -> ModuleType:
    """A module of that name, with parents, made of `members`."""
    parent, _, last = name.rpartition(".")
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = ModuleType(name)
        # transformers asks for the specification of optional packages.
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        module.__path__ = []
    for key, value in members.items():
        setattr(module, key, value)
    if parent:
        setattr(stand_in(parent), last, module)
    return module


class SDAR(Adapter):
    """The published loop; the cache is exact, so the tokens are those of recomputing everything."""

    def load(self, message: Message) -> None:
        generate_file = checkout(message, "generate.py")
        folder = checkout(message, *MODELLING)
        transformers.utils.LossKwargs = transformers.utils.TransformersKwargs
        stand_in("flash_attn", flash_attn_func=attention)
        stand_in("flash_attn.ops.triton.layer_norm", rms_norm_fn=rms_norm)
        sdar = stand_in("sdar_modelling")
        sdar.__path__ = [str(folder)]
        stand_in(
            "sdar_modelling.fused_linear_diffusion_cross_entropy", FusedLinearDiffusionCrossEntropyLoss=None
        )
        sys.path.insert(0, str(generate_file.parent))
        import generate

        module = importlib.import_module("sdar_modelling.modeling_sdar")
        generate.sample_with_temperature_topk_topp = greedy
        self.loop = generate.block_diffusion_generate
        self.model = module.SDARForCausalLM.from_pretrained(
            message["model"], dtype=torch_dtype(message)
        ).eval()
        self.watch(self.model)

    def first_position(self, tokens: torch.Tensor, arguments: Message) -> int:
        return int(arguments["position_ids"][0, 0])

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        size, block = settings["max_tokens"], settings["block_size"]
        static = settings["kind"] == "static"

        def single(prompt: list[int]) -> list[int]:
            out = self.loop(
                self.model,
                {"input_ids": torch.tensor([prompt])},
                settings["mask_token_id"],
                gen_length=size,
                block_length=block,
                denoising_steps=block // settings["tokens_per_step"] if static else block,
                remasking_strategy="low_confidence_static" if static else "low_confidence_dynamic",
                confidence_threshold=settings["threshold"],
            )
            return out[0, len(prompt) : len(prompt) + size].tolist()

        return self.one_by_one(prompts, single)


if __name__ == "__main__":
    serve(SDAR())
