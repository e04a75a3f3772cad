"""Configuration of retention; free of torch and Ray, so that the command line reads it at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fewstep.platform.config import Config

FAMILY = "family"
"""The source that is no file."""


class Retain(Config):
    """Documents that are not refined on, and on which the model stays what it was."""

    sources: tuple[str, ...] = ()
    """Files and folders as `fewstep prepare` takes them (JSONL, Parquet, `datasets` folders, trees of text); `family` alone =
    pairs like those the embedded model was pre-trained on; empty = prompts of the training side, blurred by `noise`."""
    prompt_column: str = "prompt"
    """Column or key with what stands before the text; empty = the documents have no prompts."""
    text_column: str = ""
    """Column or key with the text; empty = the unrefined model's own answers to the prompts, made before the first step."""
    chat: bool = False
    """Prompts go through the model's chat template."""
    noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of a prompt's tokens, drawn anew for each document, that other tokens of the same documents replace."""
    num_documents: int = Field(default=512, ge=1)
    """Documents kept of the sources, drawn by a hash of their place; the unrefined model answers as many."""
    sequence_tokens: int = Field(default=512, ge=32)
    """What is kept of a document, prompt included; at most the model's context."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Of the unrefined model's own answers."""
    documents_per_update: int = Field(default=8, ge=1)
    """Documents shown in each optimiser step, each under a mask of random rates and the complement."""
    weight: float = Field(default=1.0, gt=0.0)
    """Of the retention loss; the objective's own has weight 1."""
    form: Literal["k2", "k3", "nll"] = "k2"
    """k2, k3 = KL to the unrefined model, a second copy of which the trainer keeps; nll = the masked tokens' likelihood,
    which needs none."""

    @property
    def has_texts(self) -> bool:
        """Whether the documents bring their texts; otherwise the unrefined model writes them."""
        return bool(self.text_column) or self.sources == (FAMILY,)

    @model_validator(mode="after")
    def _every_key_acts(self) -> Retain:
        if self.sources == (FAMILY,):
            idle = ("prompt_column", "text_column", "chat", "noise", "temperature")
            if set_ones := [n for n in idle if getattr(self, n) != type(self).model_fields[n].default]:
                raise ValueError(f"{set_ones[0]} does nothing with sources: [{FAMILY}]")
            return self
        if FAMILY in self.sources:
            raise ValueError(f"{FAMILY} is a source on its own")
        if not self.sources and (self.text_column or self.prompt_column != "prompt" or self.chat):
            raise ValueError("prompt_column, text_column and chat do nothing without sources")
        if not self.sources and not self.noise:
            raise ValueError("retain needs sources, or noise on the prompts that are trained on")
        if self.sources and not self.prompt_column and not self.text_column:
            raise ValueError("prompt_column and text_column cannot both be empty")
        if self.text_column and (self.noise or self.temperature != 1.0):
            raise ValueError(
                "noise and temperature do nothing with text_column, whose texts are taken as they are"
            )
        if self.chat and not self.prompt_column:
            raise ValueError("chat needs prompt_column")
        return self
