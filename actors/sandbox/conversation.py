"""What the caller and one child say to each other, and what has been found out so far."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from fewstep.actors.sandbox import wire
from fewstep.platform.records import Outcome

NOT_A_FRAME = "the program wrote on its answer channel"


class ProgramLost(Exception):
    """The program's end of the conversation broke; how it died says why."""


@dataclass
class Findings:
    """What is known so far about one run."""

    outcome: Outcome
    tests: list[bool]
    detail: str = ""

    def note(self, outcome: Outcome, detail: str) -> None:
        """Keeps the first failure: what comes after it may be its consequence."""
        if self.outcome == "passed":
            self.outcome, self.detail = outcome, detail


@dataclass(frozen=True)
class Conversation:
    """One child's socket.

    Attributes:
        limit_bytes: the longest reply that is read.
    """

    connection: socket.socket
    limit_bytes: int

    def ask(self, message: Any, deadline: float) -> dict[str, Any]:
        """Sends (unless None) and waits for the next frame; `deadline` is on the monotonic clock.

        Raises:
            TimeoutError: the deadline passed.
            ProgramLost: the child is gone, or what it sent is no reply.
        """
        try:
            if message is not None:
                wire.send(self.connection, message, deadline)
            reply = wire.receive(self.connection, self.limit_bytes, deadline)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise ProgramLost("the program ended early") from error
        except wire.FrameTooLarge as error:
            raise ProgramLost(f"an answer of {error}") from error
        except (ValueError, RecursionError) as error:
            raise ProgramLost(NOT_A_FRAME) from error
        if not isinstance(reply, dict):
            raise ProgramLost(NOT_A_FRAME)
        return reply
