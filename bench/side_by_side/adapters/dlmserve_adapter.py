"""dlmserve over HTTP: LLaDA only, no cache, requests of equal step batched. The server runs in this process.

Put around the peer at run time: it binds to loopback, it takes the mask id of the model at hand (its own is a
constant), and for the fp32 parity check the weights it loaded as bf16 are widened.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from adapter import Adapter, Message, claimed_stdout, read_messages, serve

READY_S = 120.0


class DLMServe(Adapter):
    """One POST a prompt, all at once."""

    batches = True
    packages = ("torch", "transformers", "dlmserve")

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def load(self, message: Message) -> None:
        """Wait for the server of the main thread, then put the hook in."""
        give_up = time.monotonic() + READY_S
        while not self._ready():
            if time.monotonic() > give_up:
                raise TimeoutError(f"no answer from dlmserve within {READY_S:.0f} s")
            time.sleep(0.2)
        from dlmserve.api import server

        loaded = server._engine._loaded
        if message["dtype"] == "float32":
            loaded.model.float()
        self.name, self.tokenizer = message["model"], loaded.tokenizer
        self.watch(loaded.model)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                return True
        except OSError:
            return False

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        texts = [" ".join(self.tokenizer.convert_ids_to_tokens(prompt)) for prompt in prompts]
        with ThreadPoolExecutor(len(texts)) as pool:
            answers = list(pool.map(lambda text: self._complete(text, settings), texts))
        return [self.tokenizer.convert_tokens_to_ids(answer.split()) for answer in answers]

    def _complete(self, text: str, settings: Message) -> str:
        size = settings["max_tokens"]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": size,
            "block_length": settings["block_size"],
            "num_denoising_steps": size // settings["tokens_per_step"],
            "seed": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=3600) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        assert isinstance(answer, str)
        return answer


def set_mask_token(mask_token_id: int) -> None:
    """The mask id of this model in the place of the peer's constant."""
    from dlmserve.models import llada

    llada.MASK_ID = mask_token_id
    fields = llada.LoadedLLaDA.__init__.__defaults__
    assert fields == (126336,), "the loader's defaults are not what this adapter knows"
    llada.LoadedLLaDA.__init__.__defaults__ = (mask_token_id,)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """The first message names the model that the server reads at import; uvicorn wants the main thread."""
    with claimed_stdout() as send:
        messages = read_messages()
        first = next(messages)
        torch.set_num_threads(first["threads"])
        os.environ |= {"DLMSERVE_MODEL": first["model"], "DLMSERVE_DTYPE": "bf16", "DLMSERVE_DEVICE": "cpu"}
        os.environ["DLMSERVE_LOG_LEVEL"] = "error"
        set_mask_token(first["mask_token_id"])
        import uvicorn
        from dlmserve.api.server import app

        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        adapter = DLMServe(port)

        def every() -> Iterator[Message]:
            yield first
            yield from messages

        def converse() -> None:
            try:
                serve(adapter, every(), send)
            finally:
                server.should_exit = True

        threading.Thread(target=converse, daemon=True).start()
        server.run()


if __name__ == "__main__":
    main()
