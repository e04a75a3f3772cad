"""Which tasks a job asks for: the configuration of one benchmark; free of torch and Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config

BenchmarkName = Literal[
    "family", "tasks", "repair", "humaneval", "humaneval_plus", "humaneval_infilling", "mbpp", "mbpp_plus", "mbxp",
    "livecodebench", "bigcodebench", "canitedit", "exercism", "codeio",
]  # fmt: skip
AnswerName = Literal["plain", "python", "fenced", "json"]
VARIANTS: dict[str, tuple[str, ...]] = {
    "humaneval_infilling": ("single_line", "multi_line", "random_span"),
    "mbpp": ("all", "test"),
    "canitedit": ("descriptive", "lazy"),
    "codeio": ("output", "input"),
}
"""What `variant` may be; the first is the default."""
_CHAT = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "livecodebench", "bigcodebench", "canitedit", "exercism", "codeio", "tasks")  # fmt: skip


class BenchmarkChoice(Config):
    """One benchmark; `name` or `name:path` where nothing else is set."""

    name: BenchmarkName
    """`family` and `repair` are made here, `tasks` is a file of your own, the others are read from their published files."""
    path: Path | None = None
    """The published file, or a folder with it; humaneval and codeio are found in their packages without one."""
    variant: str = ""
    """humaneval_infilling: single_line, multi_line, random_span. mbpp: all, test. canitedit: descriptive, lazy.
    codeio: output, input. Empty = the first."""
    chat: bool = False
    """Ask in a message through the model's chat template, and read code blocks; false = continue text."""
    answers: AnswerName | None = None
    """tasks: how an answer is ended and read. plain: all of it. python: a continuation of Python code. fenced: what
    stands before the closing fence. json: the last JSON value. null = plain, or the fenced code of a chat answer."""
    languages: tuple[str, ...] = ()
    """mbxp: which languages; empty = every file that is there."""
    first_date: str = Field(default="", pattern=r"^(\d{4}-\d\d-\d\d)?$")
    """livecodebench: contests of this day (YYYY-MM-DD) and later."""
    last_date: str = Field(default="", pattern=r"^(\d{4}-\d\d-\d\d)?$")
    """livecodebench: contests of this day and earlier."""
    num_tasks: int | None = Field(default=None, ge=1)
    """The first so many tasks (a file, with mbxp); null = all. family and repair: how many are drawn, 500 unless said."""
    seed: int = Field(default=0, ge=0)
    """Which tasks family and repair draw, which inputs codeio."""
    corrupted_share: float = Field(default=0.05, gt=0.0, le=1.0)
    """repair: share of an answer's tokens that are replaced, at least one."""

    @model_validator(mode="after")
    def _every_key_acts(self) -> BenchmarkChoice:
        allowed = VARIANTS.get(self.name, ())
        if self.variant and self.variant not in allowed:
            raise ValueError(f"variant of {self.name} is {' or '.join(allowed) or 'not to be set'}")
        acts = {
            "chat": self.name in _CHAT,
            "answers": self.name == "tasks",
            "languages": self.name == "mbxp",
            "first_date": self.name == "livecodebench",
            "last_date": self.name == "livecodebench",
            "path": self.name not in ("family", "repair"),
            "seed": self.name in ("family", "repair", "codeio"),
            "corrupted_share": self.name == "repair",
        }
        for key, does in acts.items():
            if not does and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does nothing with {self.name}")
        return self

    @property
    def chosen_variant(self) -> str:
        """The variant, the default one filled in."""
        return self.variant or VARIANTS.get(self.name, ("",))[0]


def spelled_out(value: Any) -> Any:
    """`humaneval`, `[humaneval, mbpp:FILE]` and lists of mappings are all lists of mappings."""
    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list | tuple):
        return value
    return [one_spelled_out(item) for item in items]


def one_spelled_out(item: Any) -> Any:
    """`name` or `name:path` as a mapping; anything else as it is."""
    if not isinstance(item, str):
        return item
    name, colon, path = item.partition(":")
    return {"name": name, "path": path} if colon else {"name": name}
