"""What a family is: how its config.json reads, and which tensor of its files is which of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """One correspondence between a tensor of a file and a tensor of `Transformer.state_dict()`.

    Attributes:
        source: name in the family's files; target: ours.
        first_row: where in the source's leading axis the target begins; None = the source is the target, whole.
        index: which entry of the target's leading axis the source is (an expert); None = all of it.
    """

    source: str
    target: str
    first_row: int | None = None
    index: int | None = None


class Fields:
    """The keys of one config.json, read by name so that a missing or foreign value is reported by name.

    Args:
        where: the file, for messages.
        values: its content.
        family: the family's name, for messages.
    """

    def __init__(self, where: str, values: Mapping[str, Any], family: str) -> None:
        self.where, self.values, self.family = where, values, family

    def __getitem__(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise CheckpointError(
                f"{self.where}: {name}",
                "nothing",
                f"a value, as every {self.family} model has",
                "add the key",
            )
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def only(self, **allowed: Any) -> None:
        """Refuse keys whose value would change the arithmetic in a way this code does not follow.

        Args:
            allowed: key to the one value (or tuple of values) it may have; an absent or null key is fine.
        """
        for name, value in allowed.items():
            choices = value if isinstance(value, tuple) else (value,)
            if self.get(name) is not None and self.values[name] not in choices:
                raise CheckpointError(
                    f"{self.where}: {name}",
                    repr(self.values[name]),
                    f"{' or '.join(map(repr, choices))} for {self.family}",
                    "use a checkpoint without it",
                )


@dataclass(frozen=True)
class Family:
    """An adapter between a public checkpoint format and the one transformer.

    Attributes:
        name: what `fewstep inspect` calls it.
        model_type: config.json's; architectures: the classes of that type that hold a language model.
        read: config.json to the fields of a ModelConfig.
        pieces: every tensor of the family's files, in any order.
        head_name: the head's name in files of tied models, which may hold it a second time.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], dict[str, Any]]
    pieces: Callable[[ModelConfig], Iterator[Piece]]
    head_name: str | None = None
