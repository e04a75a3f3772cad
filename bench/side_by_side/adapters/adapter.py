"""What every adapter shares: JSON lines on stdin and stdout, counting forwards, recording what each forward opened.

An adapter runs inside a peer's own environment, so this folder imports the standard library, torch and the peer, and
nothing of Fewstep. One object a line: `{"op": "load", ...}`, `{"op": "generate", ...}`, `{"op": "close"}`; one object
a line comes back, with `error` (one line of text) where the operation failed. Whatever a peer prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Message = dict[str, Any]


class Trace:
    """What each forward saw and said, for sequences of one prompt length.

    `forwards[i]` lists, for sequence i, `(first position, tokens, chosen token, log-probability, margin)` of every
    forward it took part in; the last three are of the rows whose logits came out. Kept only for the parity check:
    the margin (best logit less second best) and the log-probability tell a near-tie from a mistake.
    """

    def __init__(self, prompts: list[list[int]], mask_token_id: int, block_size: int) -> None:
        self.prompts, self.mask_token_id, self.block_size = prompts, mask_token_id, block_size
        self.forwards: list[list[tuple[int, list[int], list[int], list[float], list[float]]]] = [
            [] for _ in prompts
        ]

    def add(self, sequence: int, first: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """One sequence's rows: int64 [R] and [R, V] (or the last rows of them)."""
        scores = logits.double()
        best, chosen = scores.topk(2, dim=-1)
        logprob = best[:, 0] - scores.logsumexp(-1)
        self.forwards[sequence].append(
            (
                first,
                tokens.tolist(),
                chosen[:, 0].tolist(),
                logprob.tolist(),
                (best[:, 0] - best[:, 1]).tolist(),
            )
        )

    def openings(self, answers: list[list[int]]) -> list[list[list[list[float]]]]:
        """For each sequence the forwards that opened something, each a list of
        `[position, opened (0 or 1), token, log-probability, margin]` over the masked positions of its block;
        positions count from the end of the prompt."""
        return [
            self._openings(number, len(prompt), answer)
            for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True))
        ]

    def _openings(self, number: int, prompt_length: int, answer: list[int]) -> list[list[list[float]]]:
        last_masked: dict[int, int] = {}
        for index, (first, tokens, *_) in enumerate(self.forwards[number]):
            for offset, token in enumerate(tokens):
                position = first + offset - prompt_length
                if token == self.mask_token_id and 0 <= position < len(answer):
                    last_masked[position] = index
        found = []
        for index, (first, tokens, chosen, logprob, margin) in enumerate(self.forwards[number]):
            rows = []
            for offset in range(len(tokens) - len(chosen), len(tokens)):
                position = first + offset - prompt_length
                if tokens[offset] != self.mask_token_id or not 0 <= position < len(answer):
                    continue
                opened = last_masked[position] == index
                at = offset - (len(tokens) - len(chosen))
                rows.append(
                    [
                        position,
                        int(opened),
                        answer[position] if opened else chosen[at],
                        logprob[at],
                        margin[at],
                    ]
                )
            blocks = {row[0] // self.block_size for row in rows if row[1]}
            if blocks:
                found.append([row for row in rows if row[0] // self.block_size in blocks])
        return found


class Adapter:
    """A peer behind two operations. Subclasses load it, and generate through the peer's own loop.

    Attributes:
        forwards, rows: of the model since the last `generate` began, counted by a hook.
        batches: whether several prompts share a forward; otherwise they run one after another.
    """

    batches = False
    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self) -> None:
        self.forwards = self.rows = 0
        self.trace: Trace | None = None
        self.current: int | None = None

    def load(self, message: Message) -> None:
        """Read the model in `message["model"]` in `message["dtype"]`."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], settings: Message) -> list[list[int]]:
        """`settings["max_tokens"]` tokens for each prompt; they have one length."""
        raise NotImplementedError

    def first_position(self, tokens: torch.Tensor, arguments: Message) -> int:
        """Absolute position of a forward's first row."""
        del tokens, arguments
        return 0

    def openings(self, answers: list[list[int]]) -> list[list[list[list[float]]]]:
        """What the traced forwards of the last `generate` opened (see `Trace.openings`)."""
        assert self.trace is not None
        return self.trace.openings(answers)

    def measure(self, message: Message) -> Message:
        """Answer `{"op": "measure", ...}`, for what only one adapter can measure."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing but answers")

    def watch(self, model: torch.nn.Module) -> None:
        """Count `model`'s forwards and rows, and record them while a trace is wanted."""

        def seen(_module: Any, positional: tuple[Any, ...], named: Message, output: Any) -> None:
            tokens = named["input_ids"] if "input_ids" in named else positional[0]
            self.forwards += 1
            self.rows += tokens.numel()
            if self.trace is not None:
                self._record(tokens, named, output.logits)

        model.register_forward_hook(seen, with_kwargs=True)

    def _record(self, tokens: torch.Tensor, named: Message, logits: torch.Tensor) -> None:
        assert self.trace is not None
        first = self.first_position(tokens, named)
        for row in range(tokens.shape[0]):
            number = self.current
            if number is None:
                length = len(self.trace.prompts[0])
                number = self.trace.prompts.index(tokens[row, :length].tolist())
            self.trace.add(number, first, tokens[row], logits[row])

    def one_by_one(
        self, prompts: list[list[int]], single: Callable[[list[int]], list[int]]
    ) -> list[list[int]]:
        """For a loop that takes one prompt."""
        answers = []
        for self.current, prompt in enumerate(prompts):
            answers.append(single(prompt))
        self.current = None
        return answers


def run_generate(adapter: Adapter, message: Message) -> Message:
    """Time one `generate`; recording slows the model down, so a traced run reports no seconds."""
    prompts = message["prompts"]
    adapter.forwards = adapter.rows = 0
    adapter.trace = (
        Trace(prompts, message["mask_token_id"], message["block_size"]) if message["trace"] else None
    )
    with torch.inference_mode():
        started, worked = time.perf_counter(), time.process_time()
        answers = adapter.generate(prompts, message)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    reply: Message = {
        "tokens": answers,
        "forwards": adapter.forwards,
        "rows": adapter.rows,
        "batched": adapter.batches or len(prompts) == 1,
    }
    if adapter.trace is None:
        return reply | {"seconds": seconds, "cpu_seconds": cpu_seconds}
    reply["openings"] = adapter.openings(answers)
    adapter.trace = None
    return reply


def run_load(adapter: Adapter, message: Message) -> Message:
    """Load the model and say what it took and with which packages."""
    torch.set_num_threads(message["threads"])
    started = time.perf_counter()
    adapter.load(message)
    return {"seconds": time.perf_counter() - started, "versions": dict(_versions(adapter.packages))}


def answer_to(adapter: Adapter, message: Message) -> Message:
    """The reply to one message; a failure is a reply too, since the other side must not wait for ever."""
    operations = {
        "load": run_load,
        "generate": run_generate,
        "measure": lambda adapter, m: adapter.measure(m),
    }
    try:
        return operations[message["op"]](adapter, message)
    except Exception as error:  # noqa: BLE001, whatever a peer raises, its row alone is lost
        import traceback

        traceback.print_exc()
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]}


def serve(
    adapter: Adapter, messages: Iterator[Message] | None = None, send: Callable[[Message], None] | None = None
) -> None:
    """Answer messages until `close` or the end of input."""
    if messages is None or send is None:
        with claimed_stdout() as channel:
            serve(adapter, read_messages(), channel)
        return
    for message in messages:
        if message["op"] == "close":
            return
        send(answer_to(adapter, message))


@contextmanager
def claimed_stdout() -> Iterator[Callable[[Message], None]]:
    """Keep stdout for replies and send everything that is printed to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as channel:
        os.dup2(2, 1)

        def send(message: Message) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        yield send


def read_messages() -> Iterator[Message]:
    """One JSON object a line."""
    for line in sys.stdin:
        if line.strip():
            yield json.loads(line)


def torch_dtype(message: Message) -> torch.dtype:
    """`float32` or `bfloat16` as torch names them."""
    dtype = getattr(torch, message["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def checkout(message: Message, *parts: str) -> Path:
    """A file of the peer's checkout; a missing one is a one-line error."""
    path = Path(message["checkout"], *parts)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; is this the right checkout?")
    return path


def _versions(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
