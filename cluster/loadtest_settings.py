"""What `fewstep loadtest` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config


class LoadtestConfig(Config):
    """Which server, how much load of what kind, and where the report goes."""

    url: str = "http://127.0.0.1:8000"
    """Root of the server, without /v1."""
    model: str = ""
    """What to ask for; empty = the first model that the server lists."""
    out: Path = Path("runs/loadtest")
    """Folder for load.json and load.png."""
    loop: Literal["closed", "open"] = "closed"
    """closed = each client sends its next request when the last is answered; open = requests arrive at `rate` whether or
    not the others are done, which is what users do, and latency counts from the moment of arrival."""
    clients: int = Field(default=16, ge=1)
    """Clients of the closed loop."""
    rate: float | None = Field(default=None, gt=0.0)
    """Arrivals a second of the open loop, a Poisson process."""
    requests: int = Field(default=200, ge=1)
    """Requests to send."""
    seconds: float | None = Field(default=None, gt=0.0)
    """Send for so long instead of counting requests."""
    endpoint: Literal["completions", "chat"] = "completions"
    prompts: Path | None = None
    """A file of JSON lines with `prompt`; null = held-out tasks of the embedded model's family. Used in order, repeated."""
    max_tokens: int = Field(default=80, ge=1)
    stream: bool = True
    """Stream answers; without it there are no times of blocks."""
    fields: dict[str, Any] = Field(default={"temperature": 0})
    """Further fields of every request's body, such as {fewstep: {threshold: 0.9}}."""
    abort_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of requests whose client leaves after a random part of `abort_within_s`."""
    abort_within_s: float = Field(default=1.0, gt=0.0)
    timeout_s: float = Field(default=120.0, gt=0.0)
    """A request that takes longer is an error."""
    key_variable: str = "FEWSTEP_API_KEY"
    """Environment variable that holds the API key, if the server asks for one."""
    seed: int = Field(default=0, ge=0)
    """Of arrivals and aborts."""

    @model_validator(mode="after")
    def _open_loop_has_a_rate(self) -> LoadtestConfig:
        if (self.loop == "open") != (self.rate is not None):
            raise ValueError("loop=open with a rate, or loop=closed without one")
        return self
