"""Configuration of `fewstep prepare`; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fewstep.platform.config import Config

SourceKind = Literal["jsonl", "parquet", "datasets", "files"]


class PrepareConfig(Config):
    """A corpus on disk becomes packed token sequences in sharded Arrow files."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Files and folders: JSONL (.gz and .zst, too), Parquet, a Hugging Face `datasets` folder, a tree of text files."""
    format: Literal["auto", "jsonl", "parquet", "datasets", "files"] = "auto"
    """What the sources are; auto = by suffix, and a folder by what lies directly in it."""
    suffixes: tuple[str, ...] = ()
    """Of a tree of text files: how the names of documents end, such as `.py`; empty = any. Hidden files are left out."""
    text_column: str = "text"
    """Column or key with the text that is learned."""
    prompt_column: str = ""
    """Column or key with what stands before the text and is not learned; empty = none."""
    tokenizer: str = ""
    """Model folder, or a tokenizer.json; empty = the embedded model's."""
    eos_token: str = ""
    """Token that ends a document; empty = the model folder's own, needed with a bare tokenizer.json."""
    out: Path = Path("runs/corpus")
    """Folder of the prepared corpus."""
    sequence_tokens: int = Field(default=1024, ge=16)
    """Longest packed sequence. A longer document is cut into several, each with positions of its own."""
    shard_mb: float = Field(default=32.0, gt=0.0)
    """Input that becomes one shard. What is lost at an interruption is what the unfinished shards had done."""
    workers: int = Field(default=0, ge=0)
    """Processes; 0 = one for each core. The result does not depend on it."""
    resume: bool = True
    """Go on with the finished shards in `out`; the sources, tokenizer and settings must be the same."""

    @field_validator("sources", "suffixes", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
