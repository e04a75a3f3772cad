"""LLaDA's generate.py (ML-GSAI/LLaDA): no cache, one batch, equal prompt lengths."""

from __future__ import annotations

import sys

import torch
from adapter import Adapter, Message, checkout, serve, torch_dtype


class LLaDA(Adapter):
    """The published loop over the modelling file that the model folder carries (see `remote_code`)."""

    batches = True

    def load(self, message: Message) -> None:
        sys.path.insert(0, str(checkout(message, "generate.py").parent))
        import generate
        from transformers import AutoModel

        self.loop = generate.generate
        self.model = AutoModel.from_pretrained(
            message["model"], trust_remote_code=True, dtype=torch_dtype(message)
        ).eval()
        self.watch(self.model)

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        size = settings["max_tokens"]
        out = self.loop(
            self.model,
            torch.tensor(prompts),
            steps=size // settings["tokens_per_step"],
            gen_length=size,
            block_length=settings["block_size"],
            temperature=0.0,
            mask_id=settings["mask_token_id"],
        )
        return out[:, len(prompts[0]) :].tolist()


if __name__ == "__main__":
    serve(LLaDA())
