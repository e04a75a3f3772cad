"""Samples for trainer ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fewstep.kernels.rows import NO_TARGET, SampleRows


def every_second_masked(
    tokens: np.ndarray[Any, np.dtype[np.int64]], mask_token: int, weight: float
) -> SampleRows:
    """A text and one state of it in which every second token is masked, asked for at that weight."""
    masked = np.arange(len(tokens)) % 2 == 0
    rows = SampleRows.clean(tokens)
    rows.add_state(
        np.where(masked, mask_token, tokens), np.arange(len(tokens)),
        np.where(masked, tokens, NO_TARGET), np.where(masked, weight, 0.0),
    )  # fmt: skip
    return rows
