"""The denoising loop of transformers' DiffusionGemma: loop shape only, its tokens compare with nobody's.

A model of the same sizes with random weights, made here: no checkpoint of another family fits its arithmetic (soft
embeddings of the last step's whole distribution, random tokens in the place of masks, a cache of the finished blocks
written by a causal encoder). Its adaptive stop is set out of reach, so that every canvas takes the same steps.
"""

from __future__ import annotations

from typing import Any

import torch
from adapter import Adapter, Message, serve, torch_dtype


class DiffusionGemma(Adapter):
    """generate() of a small dense text model; counts the encoder's forwards (one a canvas) and the decoder's."""

    batches = True

    def load(self, message: Message) -> None:
        from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

        config = DiffusionGemmaConfig(
            text_config=text_config(message["sizes"]),
            vision_config=VISION,
            canvas_length=message["block_size"],
            image_token_id=0,
            boi_token_id=1,
            eoi_token_id=2,
        )
        torch.manual_seed(0)
        self.model = DiffusionGemmaForBlockDiffusion(config).to(torch_dtype(message)).eval()
        self.watch(self.model.model.decoder)
        self.watch(self.model.model.encoder.language_model)

    def watch(self, model: torch.nn.Module) -> None:
        def seen(_module: Any, positional: tuple[Any, ...], named: Message, output: Any) -> None:
            del positional, named
            self.forwards += 1
            self.rows += output.last_hidden_state.shape[:2].numel()

        model.register_forward_hook(seen, with_kwargs=True)

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        torch.manual_seed(0)
        out = self.model.generate(
            torch.tensor(prompts),
            max_new_tokens=settings["max_tokens"],
            max_denoising_steps=settings["block_size"] // settings["tokens_per_step"],
            confidence_threshold=1e-30,
            eos_token_id=None,
            pad_token_id=None,
            disable_compile=True,
        )
        return out.sequences[:, len(prompts[0]) :].tolist()


# Vision comes along with the class and is never run; as small as it may be.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def text_config(sizes: Message) -> Message:
    """The peer's names for the sizes. Every layer attends to everything, as ours does; a layer has a dense and an expert
    part, so one expert gets half of the inner size."""
    heads = sizes["num_attention_heads"]
    dim = sizes["hidden_size"] // heads
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"] // 2,
        "moe_intermediate_size": sizes["intermediate_size"] // 2,
        "num_experts": 1,
        "top_k_experts": 1,
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["num_key_value_heads"],
        "head_dim": dim,
        "global_head_dim": dim,
        "max_position_embeddings": sizes["max_position_embeddings"],
        "layer_types": ["full_attention"] * sizes["num_hidden_layers"],
    }


if __name__ == "__main__":
    serve(DiffusionGemma())
