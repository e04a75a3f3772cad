"""Rows: how sequences and their noisy states are laid out for one training forward.

A sequence of one sample becomes its clean rows (copy 0) followed by any number of noisy states (copies 1, 2,
...), each holding only the positions of its own blocks. `visibility` turns them into the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fewstep.platform.artifacts import atomic_file

PAD_COPY = -1
NO_TARGET = -1

_ARRAYS = ("tokens", "positions", "copies", "targets", "weights", "documents")

Number = TypeVar("Number", np.int64, np.float32)


@dataclass
class SampleRows:
    """The rows of one sample, each array [R_sample]; build with `clean` and `add_state`, join several with `pack`.

    documents: which packed document a row belongs to, counted from 0.
    targets: the token to be predicted at a row, NO_TARGET where nothing is.
    weights: loss weight of the row (0 where there is no target).
    extras: further per-row floats an objective asks for, such as `old_logprob` and `advantage`.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    copies: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    extras: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    documents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.documents):
            self.documents = np.zeros(len(self.tokens), np.int64)

    @classmethod
    def pack(cls, samples: Sequence[SampleRows]) -> SampleRows:
        """Several documents as one sample: the clean rows of all, then all states; none will see another."""
        parts = [
            (n, sample, (sample.copies == 0) == clean)
            for clean in (True, False)
            for n, sample in enumerate(samples)
        ]

        def joined(name: str) -> Any:
            return np.concatenate([getattr(sample, name)[kept] for _, sample, kept in parts])

        return cls(
            joined("tokens"), joined("positions"), joined("copies"), joined("targets"), joined("weights"),
            {name: np.concatenate([s.extras[name][kept] for _, s, kept in parts]) for name in samples[0].extras},
            np.concatenate([np.full(int(kept.sum()), n, np.int64) for n, _, kept in parts]),
        )  # fmt: skip

    @classmethod
    def clean(cls, tokens: NDArray[np.int64], extra_names: tuple[str, ...] = ()) -> SampleRows:
        """Copy 0: the whole sequence from position 0, no targets."""
        size = len(tokens)
        return cls(
            tokens=np.asarray(tokens, np.int64),
            positions=np.arange(size, dtype=np.int64),
            copies=np.zeros(size, np.int64),
            targets=np.full(size, NO_TARGET, np.int64),
            weights=np.zeros(size, np.float32),
            extras={name: np.zeros(size, np.float32) for name in extra_names},
        )

    def states_only(self) -> SampleRows:
        """Without copy 0: in a bidirectional model no state sees it, and every state holds the whole sequence."""
        kept = self.copies != 0
        return SampleRows(
            self.tokens[kept], self.positions[kept], self.copies[kept], self.targets[kept], self.weights[kept],
            {name: values[kept] for name, values in self.extras.items()}, self.documents[kept],
        )  # fmt: skip

    def add_state(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        targets: NDArray[np.int64],
        weights: NDArray[np.float32],
        **extras: NDArray[np.float32],
    ) -> None:
        """Append one noisy state, before packing: whole blocks of rows that see earlier clean blocks and themselves."""
        copy = int(self.copies.max()) + 1
        self.tokens = np.concatenate((self.tokens, tokens))
        self.positions = np.concatenate((self.positions, positions))
        self.copies = np.concatenate((self.copies, np.full(len(tokens), copy, np.int64)))
        self.documents = np.concatenate((self.documents, np.zeros(len(tokens), np.int64)))
        self.targets = np.concatenate((self.targets, targets))
        self.weights = np.concatenate((self.weights, weights.astype(np.float32)))
        for name in self.extras:
            self.extras[name] = np.concatenate((self.extras[name], extras[name].astype(np.float32)))


@dataclass
class RowBatch:
    """A padded batch of samples, each array [N, R]; numpy, so that it crosses processes cheaply."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    copies: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    extras: dict[str, NDArray[np.float32]]
    documents: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Real rows, padding not counted."""
        return int((self.copies != PAD_COPY).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of real rows of the same sample."""
        return int(((self.copies != PAD_COPY).sum(1) ** 2).sum())

    @classmethod
    def collate(cls, samples: list[SampleRows], pad_token: int = 0) -> RowBatch:
        """Pad samples to the longest."""
        longest = max(len(sample.tokens) for sample in samples)

        def integers(name: str, value: int) -> NDArray[np.int64]:
            return _padded([getattr(sample, name) for sample in samples], longest, np.int64(value))

        def floats(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
            return _padded(arrays, longest, np.float32(0))

        return cls(
            tokens=integers("tokens", pad_token),
            positions=integers("positions", 0),
            copies=integers("copies", PAD_COPY),
            targets=integers("targets", NO_TARGET),
            weights=floats([sample.weights for sample in samples]),
            extras={name: floats([sample.extras[name] for sample in samples]) for name in samples[0].extras},
            documents=integers("documents", 0),
        )


def save_samples(path: Path, samples: Sequence[SampleRows]) -> None:
    """Keep samples as they are in one .npz file, whole or not at all."""
    arrays: dict[str, Any] = {}
    for index, sample in enumerate(samples):
        arrays |= {f"{index}/{name}": getattr(sample, name) for name in _ARRAYS}
        arrays |= {f"{index}/extras/{name}": values for name, values in sample.extras.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_samples(path: Path) -> list[SampleRows]:
    """What `save_samples` kept."""
    fields: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            index, _, name = key.partition("/")
            own = fields.setdefault(int(index), {"extras": {}})
            if name.startswith("extras/"):
                own["extras"][name.removeprefix("extras/")] = file[key]
            else:
                own[name] = file[key]
    return [SampleRows(**fields[index]) for index in sorted(fields)]


def _padded(arrays: list[NDArray[Number]], length: int, value: Number) -> NDArray[Number]:
    out = np.full((len(arrays), length), value, dtype=value.dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
