"""Fast-dLLM v1's llada/generate.py (NVlabs/Fast-dLLM): no, prefix or dual cache; one prompt at a time."""

from __future__ import annotations

import sys

import torch
from adapter import Adapter, Message, checkout, serve, torch_dtype

LOOPS = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


class FastDLLM(Adapter):
    """Its own modelling file, which the caches need."""

    def load(self, message: Message) -> None:
        sys.path.insert(0, str(checkout(message, "llada", "generate.py").parent))
        import generate
        from model.modeling_llada import LLaDAModelLM

        self.module = generate
        self.model = LLaDAModelLM.from_pretrained(message["model"], dtype=torch_dtype(message)).eval()
        self.watch(self.model)

    def first_position(self, tokens: torch.Tensor, arguments: Message) -> int:
        replaced = arguments.get("replace_position")
        if replaced is not None:
            return int(replaced[0].nonzero()[0])
        return self.length - tokens.shape[1]

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        loop, size = getattr(self.module, LOOPS[settings["cache"]]), settings["max_tokens"]
        static = settings["kind"] == "static"

        def single(prompt: list[int]) -> list[int]:
            self.length = len(prompt) + size
            out, _ = loop(
                self.model,
                torch.tensor([prompt]),
                steps=size // settings["tokens_per_step"] if static else size,
                gen_length=size,
                block_length=settings["block_size"],
                temperature=0.0,
                mask_id=settings["mask_token_id"],
                threshold=None if static else settings["threshold"],
            )
            return out[0, len(prompt) :].tolist()

        return self.one_by_one(prompts, single)


if __name__ == "__main__":
    serve(FastDLLM())
