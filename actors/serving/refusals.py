"""What a server says instead of an answer when the request is fine and the moment, or the caller, is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fewstep.platform.errors import FewstepError


class Refused(FewstepError):
    """A request that was not answered; in OpenAI's error shape.

    Attributes:
        status: HTTP status; kind, param, code: `type`, `param` and `code` of the error object.
        reason: one word for metrics and logs.
    """

    status: ClassVar[int] = 500
    param: ClassVar[str | None] = None
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "refused"
    reason: ClassVar[str] = "refused"

    @property
    def headers(self) -> Mapping[str, str]:
        """Response headers beside the body."""
        return {}

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code},
        }


class _TryLater(Refused):
    """A refusal that ends by itself after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[_TryLater], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class QueueFull(_TryLater):
    """As many requests wait as may wait."""

    status, kind, code, reason = 429, "rate_limit_exceeded", "queue_full", "queue_full"


class BudgetSpent(_TryLater):
    """The caller's key has used what it has a minute."""

    status, kind, code, reason = 429, "rate_limit_exceeded", "rate_limit_exceeded", "budget"


class Draining(_TryLater):
    """The server is about to end and takes nothing new."""

    status, kind, code, reason = 503, "server_error", "draining", "draining"


class WrongKey(Refused):
    """No API key, or one that is not in the file."""

    status, kind, code, reason = 401, "invalid_request_error", "invalid_api_key", "key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer"}


class TooLarge(Refused):
    """A body above the limit."""

    param = "body"
    status, kind, code, reason = 413, "invalid_request_error", "request_too_large", "size"


class DeadlineExceeded(Refused):
    """The request was not done in its time; what it had is dropped and its slot is free again."""

    status, kind, code, reason = 408, "timeout_error", "deadline_exceeded", "deadline"

    @property
    def headers(self) -> Mapping[str, str]:
        # The openai client repeats a 408 by itself; the same request would not be faster the second time.
        return {"x-should-retry": "false"}
