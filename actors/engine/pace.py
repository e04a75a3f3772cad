"""How fast an engine has been lately, for whoever wants to foresee when it will be through."""

from __future__ import annotations

_SHARE = 1 / 64  # of each new sample: about the last 64 of them count


class Pace:
    """Exponentially weighted means; 0 = none seen yet.

    Attributes:
        tokens_per_forward: that one request commits in a forward that decides something for it (TPF).
        step_s: seconds of one step, whatever it carried.
        answer_tokens: of an answer that came to its end; answer_share: of what it was allowed to write.
    """

    def __init__(self) -> None:
        self.tokens_per_forward = self.step_s = self.answer_tokens = self.answer_share = 0.0
        self._steps = self._decisions = self._answers = 0

    def note_step(self, num_tokens: float, num_deciding: int, seconds: float) -> None:
        """A step that decided something for `num_deciding` requests, and committed so many tokens for them together."""
        self._steps += 1
        self.step_s = _moved(self.step_s, seconds, self._steps)
        if num_deciding:
            self._decisions += 1
            found = num_tokens / num_deciding
            self.tokens_per_forward = _moved(self.tokens_per_forward, found, self._decisions)

    def note_answer(self, num_tokens: int, max_tokens: int) -> None:
        """An answer that ended by itself."""
        self._answers += 1
        self.answer_tokens = _moved(self.answer_tokens, num_tokens, self._answers)
        self.answer_share = _moved(self.answer_share, num_tokens / max_tokens, self._answers)


def _moved(mean: float, sample: float, count: int) -> float:
    """The mean after its sample number `count`; the first ones count alike, or the start would be remembered for long."""
    return mean + max(1.0 / count, _SHARE) * (sample - mean)
