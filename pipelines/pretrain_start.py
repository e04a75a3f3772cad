"""What a pre-training job starts from: fresh weights or a given model, and the data that fit it; all checked here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fewstep.kernels.model.checkpoint import check_weights
from fewstep.kernels.model.config import NO_TOKEN, ModelConfig
from fewstep.kernels.model.lora_settings import LoraSettings, chosen_modules
from fewstep.kernels.model.tokenizer_file import load_tokenizer
from fewstep.pipelines.corpus import TOKENIZER, Corpus
from fewstep.pipelines.curriculum import Batches, CorpusBatches, FamilyBatches
from fewstep.pipelines.lineage import CONVERSION
from fewstep.pipelines.models import pinned_model
from fewstep.pipelines.settings import FREE_ON_RESUME, ModelSize, PretrainConfig
from fewstep.pipelines.tasks.family import draw_pair
from fewstep.pipelines.tasks.vocabulary import EOS_ID, MASK, MASK_ID, PAD_ID, build_tokenizer
from fewstep.platform.artifacts import file_digest, weights_digest
from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError
from fewstep.platform.rng import generator
from fewstep.platform.tracking import Tracker


@dataclass(frozen=True)
class Start:
    """A model before its first step.

    Attributes:
        initial: the folder its weights are in, or the seed of fresh ones.
        digest: of the weights; "" where they are fresh.
        address: as given, an alias resolved to a version.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    initial: Path | int
    digest: str
    address: str

    @property
    def source(self) -> Path | None:
        """The folder whose format and other files the result keeps."""
        return self.initial if isinstance(self.initial, Path) else None


def open_corpus(data: str) -> Corpus | None:
    """The corpus a configuration names; None where it names none. Raises CheckpointError."""
    return Corpus(Path(data)) if data else None


def find_start(config: PretrainConfig, corpus: Corpus | None) -> Start:
    """The model of a job, and whether data and phases fit it.

    Raises:
        UserError: a model that cannot be denoised or loaded, whose tokenizer is not the data's, whose context is too
            short, or whose block size is not what the last phase trains.
    """
    if config.model:
        start = _given(config)
    elif corpus is None:
        tokenizer = build_tokenizer()
        start = Start(_fresh(config.size, tokenizer, MASK_ID, EOS_ID, PAD_ID), tokenizer, config.seed, "", "")
    else:
        start = _fresh_on(config, corpus)
    check_data(start, corpus, [phase.block_size for phase in config.phases], "phases")
    return start


def find_batches(config: PretrainConfig, start: Start, corpus: Corpus | None) -> Batches:
    """Where the job's samples come from."""
    if corpus is None:
        return FamilyBatches(config, start.model, start.tokenizer)
    return CorpusBatches(config, start.model, start.tokenizer, corpus)


def log_lineage(tracker: Tracker, config: PretrainConfig, corpus: Corpus | None) -> None:
    """The data of a run by digest."""
    if corpus is None:
        tracker.log_dataset(
            "family-training", digest=f"{config.seed:016x}", context="training",
            source=f"pairs of the embedded family's training side, keyed by (seed {config.seed}, step, sample)",
        )  # fmt: skip
        return
    counts = ("num_documents", "num_tokens", "num_sequences", "num_bad_rows")
    tracker.log_dataset(
        corpus.folder.name, digest=corpus.digest[:16], context="training", source=str(corpus.folder),
        profile={name: int(corpus.manifest[name]) for name in counts},
    )  # fmt: skip


def example_of(start: Start, corpus: Corpus | None) -> str:
    """A prompt the trained model can be asked: of the family, or how a document of the corpus begins."""
    if corpus is None:
        return draw_pair(generator("example"))[0]
    piece = corpus[0][0]
    text: str = start.tokenizer.decode(piece.tokens[: piece.num_prompt or 16].tolist())
    return text


def given_model(model: str, tracking_uri: str, lora: LoraSettings | None = None) -> Start:
    """A model that is there, to be trained on.

    Args:
        model: as `pinned_model` takes it.
        lora: of the adapter to be trained on it.
    Raises:
        UserError: one that cannot be found or loaded, that does not denoise, or that has no such module.
    """
    address, folder = pinned_model(model, tracking_uri)
    config = ModelConfig.load(folder)
    if config.attention_kind == "causal":
        raise ConfigError(
            "model",
            f"{address}, an autoregressive model",
            "one that denoises",
            "run fewstep convert on it",
        )
    check_weights(folder, config)
    if lora is not None:
        chosen_modules(config, lora.target_modules)
    return Start(config, load_tokenizer(folder, config), folder, weights_digest(folder), address)


def _given(config: PretrainConfig) -> Start:
    start = given_model(config.model, config.tracking_uri or "", config.trainer.lora)
    last, model = config.phases[-1].block_size, start.model
    if last != model.block_size or (model.attention_kind == "bidirectional" and len(config.phases) > 1):
        raise ConfigError(
            "phases",
            f"{len(config.phases)}, the last at block size {last}",
            f"the last at the model's block size {model.block_size}",
            f"set phases=[{{block_size: {model.block_size}, share: 1}}]",
        )
    return start


def _fresh(size: ModelSize, tokenizer: Tokenizer, mask: int, eos: int, pad: int) -> ModelConfig:
    sizes: dict[str, Any] = size.model_dump()
    return ModelConfig(
        **sizes,
        head_dim=size.hidden_size // size.num_attention_heads,
        vocab_size=tokenizer.get_vocab_size(),
        mask_token_id=mask,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _fresh_on(config: PretrainConfig, corpus: Corpus) -> Start:
    """A fresh model with the corpus's tokenizer, which gets a mask token where it has none."""
    tokenizer, manifest = corpus.tokenizer(), corpus.manifest
    mask = int(manifest["mask_token_id"])
    if mask == NO_TOKEN or mask >= tokenizer.get_vocab_size():
        tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        mask = tokenizer.get_vocab()[MASK]
    eos = int(manifest["eos_token_id"])
    return Start(_fresh(config.size, tokenizer, mask, eos, eos), tokenizer, config.seed, "", "")


def _tokenizers(folder: Path) -> set[str]:
    """Digests of the tokenizers that give the model's tokens: its own and, of a converted model, the source's, to which
    nothing but the mask was added."""
    record = folder / CONVERSION
    converted = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    # A record of an earlier version does not say the source's.
    known = {"source_tokenizer"} & converted.keys()
    return {file_digest(folder / TOKENIZER), *(converted[key] for key in known)}


def check_data(start: Start, corpus: Corpus | None, block_sizes: Sequence[int], key: str) -> None:
    """Checks that the data are in the model's tokens, fit its context, and end where blocks end.

    Args:
        corpus: None = pairs of the embedded family.
        block_sizes: those trained at, which the key `key` of the configuration says.
    Raises:
        ConfigError: they do not.
    """
    if corpus is None:
        if start.source is not None and start.tokenizer.to_str() != build_tokenizer().to_str():
            raise ConfigError(
                "data", "nothing", "a prepared corpus, as the model's tokenizer is not the embedded family's",
                "run fewstep prepare with this model as tokenizer",
            )  # fmt: skip
        return
    if start.source is not None and corpus.manifest["tokenizer"] not in _tokenizers(start.source):
        raise ConfigError(
            "data", f"{corpus.folder}, made with another tokenizer", f"a corpus made with {start.address}'s",
            "run fewstep prepare with this model as tokenizer",
        )  # fmt: skip
    longest = int(corpus.manifest["sequence_tokens"])
    if longest > start.model.max_position_embeddings:
        raise ConfigError(
            "data", f"sequences of {longest} tokens", f"at most the model's {start.model.max_position_embeddings}",
            "prepare with a smaller sequence_tokens",
        )  # fmt: skip
    for block_size in block_sizes:
        if longest % block_size:
            raise ConfigError(
                key, f"block size {block_size}", f"a divisor of the corpus's sequence_tokens {longest}",
                "change the block size, or prepare with another sequence_tokens",
            )  # fmt: skip


def job_fingerprint(config: Config, start: Start, corpus: Corpus | None) -> str:
    """Configuration, data and starting weights of a job."""
    text = config.model_dump_json(exclude=FREE_ON_RESUME)
    parts = (text, corpus.digest if corpus is not None else "", start.digest)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
