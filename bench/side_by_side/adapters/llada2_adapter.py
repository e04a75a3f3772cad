"""LLaDA2's sampler of ZHZisZZ/dllm: block-causal without a cache (the whole window again), one batch.

Only the sampler and the modelling file are imported: the package's own `__init__` pulls in its training stack. The
sampler's mask is bf16 whatever the model is, so a hook casts it for the fp32 parity check.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from adapter import Adapter, Message, checkout, serve, torch_dtype

# More than any probability: the threshold never opens anything and the schedule decides.
NEVER = 2.0


def bare_package(name: str, folder: Path) -> None:
    """Make `name` importable from `folder` without running its `__init__`."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


class LLaDA2(Adapter):
    """The sampler that batches prompts of one length."""

    batches = True

    def load(self, message: Message) -> None:
        root = checkout(message, "dllm")
        for name in ("dllm", "dllm.core", "dllm.core.samplers", "dllm.pipelines", "dllm.pipelines.llada2"):
            bare_package(name, root.joinpath(*name.split(".")[1:]))
        sampler = importlib.import_module("dllm.pipelines.llada2.sampler")
        models = importlib.import_module("dllm.pipelines.llada2.models")
        self.dtype = torch_dtype(message)
        self.model = models.LLaDA2MoeModelLM.from_pretrained(message["model"], dtype=self.dtype).eval()
        self.model.register_forward_pre_hook(self._cast_mask, with_kwargs=True)
        self.watch(self.model)
        self.sampler = sampler.LLaDA2Sampler

    def _cast_mask(
        self, _module: Any, positional: tuple[Any, ...], named: Message
    ) -> tuple[tuple[Any, ...], Message]:
        return positional, named | {"attention_mask": named["attention_mask"].to(self.dtype)}

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        size, block = settings["max_tokens"], settings["block_size"]
        static = settings["kind"] == "static"
        tokenizer = SimpleNamespace(mask_token_id=settings["mask_token_id"], eos_token_id=None)
        out = self.sampler(model=self.model, tokenizer=tokenizer).sample(
            prompts,
            max_new_tokens=size,
            block_size=block,
            steps_per_block=block // settings["tokens_per_step"] if static else block,
            temperature=0.0,
            threshold=NEVER if static else settings["threshold"],
        )
        length = len(prompts[0])
        return out[:, length : length + size].tolist()


if __name__ == "__main__":
    serve(LLaDA2())
