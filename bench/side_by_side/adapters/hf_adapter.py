"""Autoregressive decoding with transformers: a Qwen3 of the same sizes, key/value cache, greedy, fixed length."""

from __future__ import annotations

import torch
from adapter import Adapter, Message, serve, torch_dtype


class HuggingFace(Adapter):
    """generate() of AutoModelForCausalLM; a forward a token after the prompt's."""

    batches = True

    def load(self, message: Message) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(message["model"], dtype=torch_dtype(message)).eval()
        self.watch(self.model)

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        size = settings["max_tokens"]
        tokens = torch.tensor(prompts)
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=size,
            min_new_tokens=size,
            do_sample=False,
        )
        return out[:, len(prompts[0]) :].tolist()


if __name__ == "__main__":
    serve(HuggingFace())
