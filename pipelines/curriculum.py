"""What a step of pre-training trains on: the plan over steps, and batches of the embedded family or of a corpus.

Batch s is a pure function of (configuration, data, seed, s); nothing is consumed, so a resumed run draws what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from fewstep.kernels.model.config import ModelConfig
from fewstep.kernels.rows import SampleRows
from fewstep.pipelines.corpus import Corpus
from fewstep.pipelines.corruption import Sample, Tokens, edit_state, mask_states
from fewstep.pipelines.packing import Piece
from fewstep.pipelines.schedule import rate_share
from fewstep.pipelines.settings import PretrainConfig
from fewstep.pipelines.tasks.family import draw_pair
from fewstep.pipelines.tasks.vocabulary import encode_pair, family_ids
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import generator


@dataclass(frozen=True)
class Plan:
    """What one step of the curriculum does.

    Attributes:
        mask_rates: the range a block's mask rate is drawn from.
        weighted: a masked token weighs 1/rate; not while the rates are still rising.
    """

    block_size: int
    edits: bool
    learning_rate: float
    mask_rates: tuple[float, float]
    weighted: bool


def plan_step(config: PretrainConfig, step: int) -> Plan:
    """The phase's block size and mask rates, whether edits are on, and the learning rate: linear warm-up, constant,
    linear to zero.

    During `rate_warmup_steps` the mask rates' upper end rises from 1/B, and the weights are 1 (Stable-DiffCoder,
    2601.15892: it takes the spike off the gradient when an autoregressive model begins to denoise).
    """
    done = step / config.steps
    edge, phase = 0.0, config.phases[-1]
    for candidate in config.phases:
        edge += candidate.share
        if done < edge - 1e-9:
            phase = candidate
            break
    rate = rate_share(step, done, warmup_steps=config.warmup_steps, decay_share=config.decay_share)
    low, high = phase.mask_rates or (config.min_mask_rate, 1.0)
    rising = step < config.rate_warmup_steps
    if rising:
        floor = 1.0 / phase.block_size
        high = max(floor, low + (high - low) * step / config.rate_warmup_steps)
    return Plan(
        phase.block_size,
        done >= 1.0 - config.edit_share,
        config.learning_rate * rate,
        (min(low, high), high),
        not rising,
    )


class Batches(Protocol):
    """Draws the samples of a step."""

    def draw(self, step: int) -> list[SampleRows]: ...


@dataclass(frozen=True)
class Corruption:
    """How a document becomes rows: the model's tokens and attention, and what an edit may write.

    Attributes:
        vocabulary: int64, tokens an edit may write.
    """

    config: PretrainConfig
    model: ModelConfig
    vocabulary: Tokens

    def rows(self, sample: Sample, plan: Plan, draws: np.random.Generator) -> SampleRows:
        """A document's clean rows, its masked states and, once edits are on, an edited one."""
        block_size = visible_block(self.model, plan)
        rows = SampleRows.clean(sample.tokens, ("noise",))
        mask_states(
            sample, rows, block_size=block_size, mask_token=self.model.mask_token_id, rates=plan.mask_rates,
            weighted=plan.weighted, complementary=self.config.complementary, draws=draws,
        )  # fmt: skip
        if plan.edits:
            # In blocks of the model's own size even where all is one block: an edit's shift stays local.
            whole = self.model.attention_kind == "bidirectional"
            edit_state(
                sample, rows, block_size=plan.block_size, vocabulary=self.vocabulary, draws=draws, whole=whole
            )
        return rows


def visible_block(model: ModelConfig, plan: Plan) -> int:
    """The block size of masks and of attention; a bidirectional model's is its whole context."""
    return model.sees_block if model.attention_kind == "bidirectional" else plan.block_size


class FamilyBatches:
    """Fresh pairs of the embedded family; every number is keyed by (run seed, step, sample)."""

    def __init__(self, config: PretrainConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._eos = model.eos_token_id
        self._corruption = Corruption(config, model, family_ids(tokenizer))

    def draw(self, step: int) -> list[SampleRows]:
        plan = plan_step(self._config, step)
        return normalised([self._sample(plan, step, index) for index in range(self._config.batch_size)])

    def _sample(self, plan: Plan, step: int, index: int) -> SampleRows:
        draws = generator("pretrain", self._config.seed, step, index)
        tokens, num_prompt = encode_pair(self._tokenizer, *draw_pair(draws))
        sample = Sample.padded(tokens, num_prompt, plan.block_size, self._eos)
        return self._corruption.rows(sample, plan, draws)


class CorpusBatches:
    """Packed sequences of a corpus, every epoch in an order of its own, keyed by (run seed, epoch)."""

    def __init__(
        self, config: PretrainConfig, model: ModelConfig, tokenizer: Tokenizer, corpus: Corpus
    ) -> None:
        self._config, self._model, self._corpus = config, model, corpus
        self._corruption = Corruption(config, model, ordinary_ids(tokenizer, model))
        self._order: tuple[int, Tokens] = (-1, np.zeros(0, np.int64))

    def draw(self, step: int) -> list[SampleRows]:
        plan = plan_step(self._config, step)
        first = step * self._config.batch_size
        return normalised([self._sample(plan, first + index) for index in range(self._config.batch_size)])

    def sequence(self, position: int) -> int:
        """Which sequence of the corpus stands at a position of the endless stream of epochs."""
        epoch, within = divmod(position, len(self._corpus))
        if self._order[0] != epoch:
            draws = generator("corpus-order", self._config.seed, epoch)
            self._order = (epoch, draws.permutation(len(self._corpus)))
        return int(self._order[1][within])

    def _sample(self, plan: Plan, position: int) -> SampleRows:
        draws = generator("pretrain-corpus", self._config.seed, position)
        samples = learned_samples(self._corpus, self.sequence(position), self._model, plan.block_size)
        return SampleRows.pack([self._corruption.rows(sample, plan, draws) for sample in samples])


def learned_samples(corpus: Corpus, number: int, model: ModelConfig, block_size: int) -> list[Sample]:
    """The pieces of a sequence that have something to predict; of the next such sequence where it has none.

    Raises:
        ConfigError: no sequence has any.
    """
    for step in range(len(corpus)):
        pieces = corpus[(number + step) % len(corpus)]
        samples = [sample for piece in pieces if (sample := _learned(piece, model, block_size)) is not None]
        if samples:
            return samples
    raise ConfigError(
        "data", str(corpus.folder), "a corpus with something to learn", "prepare longer documents"
    )


def _learned(piece: Piece, model: ModelConfig, block_size: int) -> Sample | None:
    """A piece as a sample; None where nothing of it can be predicted."""
    tokens = piece.tokens.astype(np.int64)
    # With shifted logits no row predicts the first token.
    num_prompt = max(piece.num_prompt, int(model.logit_shift))
    if num_prompt >= len(tokens):
        return None
    if not piece.complete:  # no end to fill up with; the document goes on in another sequence
        return Sample(tokens, num_prompt)
    return Sample.padded(tokens, num_prompt, block_size, model.eos_token_id)


def ordinary_ids(tokenizer: Tokenizer, model: ModelConfig) -> Tokens:
    """int64 ids of all tokens that are text: what an edit may write."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {model.mask_token_id, model.eos_token_id, model.pad_token_id}
    return np.array(sorted(set(tokenizer.get_vocab().values()) - special), np.int64)


def normalised(samples: Sequence[SampleRows]) -> list[SampleRows]:
    """Weights divided by the number of targets of the whole batch."""
    total = sum(int((sample.targets >= 0).sum()) for sample in samples)
    for sample in samples:
        sample.weights /= total
    return list(samples)
