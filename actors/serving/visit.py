"""What is known of one HTTP request while it is being answered: for limits, metrics, logs and spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fewstep.actors.serving.keys import KeyEntry


@dataclass
class AnswerRecord:
    """One answer of a request. Times are in seconds of the monotonic clock, 0 = not yet.

    Attributes:
        num_tokens: committed so far; num_blocks: commits that brought text or tokens; forwards: known at the end.
        finish: stop, length, abort or error.
    """

    model: str
    num_prompt_tokens: int
    offered: float
    started: float = 0.0
    first_block: float = 0.0
    last_block: float = 0.0
    ended: float = 0.0
    num_tokens: int = 0
    num_blocks: int = 0
    forwards: int = 0
    finish: str = "abort"


@dataclass
class Visit:
    """One HTTP request.

    Attributes:
        started: monotonic seconds; started_at: Unix seconds; deadline: monotonic seconds.
        key: whose it is, None = keys are not asked for.
        refused: why it was not answered, one word.
        body: what was sent, kept only where logs may hold prompts.
        settle: ends each answer that has not ended; for those that nobody began to read.
    """

    method: str
    path: str
    started: float
    started_at: float
    deadline: float
    traceparent: str = ""
    key: KeyEntry | None = None
    user: str = ""
    route: str = "other"
    status: int = 500
    request_id: str = ""
    refused: str = ""
    num_body_bytes: int = 0
    body: bytearray = field(default_factory=bytearray)
    answers: list[AnswerRecord] = field(default_factory=list)
    settle: list[Callable[[], None]] = field(default_factory=list)

    @property
    def key_name(self) -> str:
        return self.key.name if self.key is not None else ""

    def fields(self, seconds: float) -> Iterator[tuple[str, object]]:
        """What a log line or a span says about it; never text of a prompt or an answer.

        Args:
            seconds: from start to end.
        """
        yield from {
            "id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(seconds, 6),
            "body_bytes": self.num_body_bytes,
        }.items()
        optional = {"key": self.key_name, "user": self.user, "refused": self.refused}
        yield from ((name, value) for name, value in optional.items() if value)
        if self.answers:
            first = [answer.first_block for answer in self.answers if answer.first_block]
            waits = [answer.started - answer.offered for answer in self.answers if answer.started]
            tokens = sum(answer.num_tokens for answer in self.answers)
            forwards = sum(answer.forwards for answer in self.answers)
            yield "model", self.answers[0].model
            yield "finish", ",".join(answer.finish for answer in self.answers)
            yield "prompt_tokens", sum(answer.num_prompt_tokens for answer in self.answers)
            yield "committed_tokens", tokens
            yield "forwards", forwards
            yield "tokens_per_forward", round(tokens / max(1, forwards), 3)
            yield "queue_seconds", round(max(waits, default=0.0), 6)
            if first:
                yield "first_block_seconds", round(min(first) - self.started, 6)
