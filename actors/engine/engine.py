"""The engine: requests join and leave between any two forwards; a step is one forward over all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer

from fewstep.actors.engine.cache import PageStore, num_pages_for, page_bytes, page_size
from fewstep.actors.engine.canvas import BlockReport, Canvases
from fewstep.actors.engine.pace import Pace
from fewstep.actors.engine.pages import PagePool
from fewstep.actors.engine.progress import Outcome, advance
from fewstep.actors.engine.record import record
from fewstep.actors.engine.request import Request, Update, check_model, check_pages
from fewstep.actors.engine.scheduler import Scheduler, Span
from fewstep.actors.engine.scheduler import Sequence as Running
from fewstep.actors.engine.static_step import StaticSteps
from fewstep.actors.engine.text import TextStream, decode, find_stop
from fewstep.actors.engine.watch import view_of
from fewstep.kernels.model.transformer import Transformer
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.records import FinishReason, Trajectory, WeightVersion


class Engine:
    """Denoises many requests together; each result depends on weights, prompt, policy and seed alone.

    Floating point limits that promise: a matrix product may round differently when it has more rows, so a
    confidence within about 1e-6 of a threshold, or two tokens that close, can fall the other way in another
    batch. Nothing else couples requests. An approximate cache of a bidirectional model is refreshed when weights change.

    Args:
        model: owned by the engine from here on; `load_weights` writes into it.
        max_sequences: requests that share a forward; further ones wait, first come first served.
        weight_version: which weights `model` holds now.
        memory_bytes: budget for cached keys and values; when it is used up the youngest requests give theirs up and
            recompute them later. None = what all sequences can use, at most half of the machine's free memory.
        prefix_cache: whether finished blocks are shared by requests that begin with the same tokens.
        merged_commit: whether a finished block's keys and values are written by the first forward of the next block, or
            by a forward of their own (same tokens, more forwards).
        max_rows: rows of a prompt that a request computes in one forward; None = all.
        static_steps: run forwards whose shapes allow it as steps of fixed shape (see `StaticSteps`), on a GPU as CUDA
            graphs; None = on a GPU, unless the model is a mixture of experts or sharded. Same tokens either way.

    Raises:
        CheckpointError: a model that is not denoised block by block or as a whole.

    Attributes:
        forwards, rows: forwards run and rows they had; committed_tokens: tokens of ended requests that count.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_sequences: int = 64,
        weight_version: WeightVersion,
        memory_bytes: int | None = None,
        prefix_cache: bool = True,
        merged_commit: bool = True,
        max_rows: int | None = None,
        static_steps: bool | None = None,
    ) -> None:
        check_model(model.config)
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.model.pack()
        self.weight_version = weight_version
        self.forwards = self.committed_tokens = self.rows = 0
        self._drift_sum, self._drift_count = 0.0, 0
        self._pace = Pace()
        weight = model.head_weight
        num_pages = num_pages_for(self.model.held, weight.dtype, weight.device, max_sequences, memory_bytes)
        self._page_bytes = page_bytes(self.model.held, weight.dtype)
        self._store = PageStore(self.model.held, num_pages, weight.dtype, weight.device)
        self._pool = PagePool(num_pages, prefix_cache and self.config.attention_kind == "block_causal")
        self._canvases = Canvases(self.config, max_sequences, self._store, weight.device)
        capture = weight.device.type == "cuda" and self.config.moe is None and self.model.alone
        self._static: StaticSteps | None = None
        if capture if static_steps is None else static_steps:
            self._static = StaticSteps(self.model, self._canvases, self._store, capture)
        self._scheduler = Scheduler(
            self.config, self._pool, page_size(self.config), max_sequences, merged_commit, max_rows
        )
        self._unread: set[str] = set()
        self._ids: set[str] = set()

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would run a forward."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    def stats(self) -> dict[str, float]:
        """Counts of the moment and since the start.

        pages_*: of the pool, `cached` ones hold a block for reuse and are given out when free ones run out;
        static_forwards: forwards run as steps of fixed shape; page_bytes: bytes of one over all layers; prefix_hits, prefix_misses: blocks found and not found;
        cache_drift: mean over refreshes of an approximate cache (see `Trajectory`);
        masks_running, masks_waiting: tokens that requests in a slot and before it may still write; the rest: see `Pace`.
        """
        pool, scheduler, pace = self._pool, self._scheduler, self._pace
        # Copied in one go: another thread may be stepping.
        running, waiting = list(scheduler.running.values()), list(scheduler.waiting)
        return {
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "slots_free": len(scheduler.free_slots),
            "forwards": self.forwards,
            "static_forwards": self._static.forwards if self._static is not None else 0,
            "rows": self.rows,
            "committed_tokens": self.committed_tokens,
            "pages_total": pool.num_pages,
            "pages_free": pool.num_free,
            "pages_cached": pool.num_kept,
            "page_bytes": self._page_bytes,
            "prefix_hits": pool.hits,
            "prefix_misses": pool.misses,
            "preemptions": scheduler.preemptions,
            "cache_drift": self._drift_sum / max(1, self._drift_count),
            "masks_running": sum(max(0, sequence.end - sequence.text_end) for sequence in running),
            "masks_waiting": sum(request.max_tokens for request in waiting),
            "tokens_per_forward": pace.tokens_per_forward,
            "step_s": pace.step_s,
            "answer_tokens": pace.answer_tokens,
            "answer_share": pace.answer_share,
        }

    def add(self, request: Request) -> None:
        """Take a request; it joins at the next step that has a free slot.

        Raises:
            RequestError: names the field this model cannot serve, or an id that is in use.
        """
        request.validate(self.config)
        check_pages(request, self.config, self._pool.num_pages, page_size(self.config), self._page_bytes)
        if request.request_id in self._ids:
            raise RequestError("request_id", request.request_id, "an id not in use", "choose another id")
        self._ids.add(request.request_id)
        self._scheduler.enqueue(request)

    def abort(self, request_id: str) -> Trajectory | None:
        """Drop a request and free its slot and pages at once; an unknown id is one that has already ended.

        Returns:
            What it had got, with finish reason `abort`; None if it had not started.
        """
        self._ids.discard(request_id)
        self._unread.discard(request_id)
        waiting = self._scheduler.waiting
        for request in [request for request in waiting if request.request_id == request_id]:
            waiting.remove(request)
        sequence = self._scheduler.running.get(request_id)
        if sequence is None:
            return None
        num_tokens = sequence.text_end - len(sequence.request.prompt_ids)
        trajectory = self._trajectory(sequence, sequence.live_end, num_tokens, "abort")
        self._scheduler.leave(sequence)
        return trajectory

    def load_weights(self, state: Mapping[str, torch.Tensor], version: WeightVersion) -> None:
        """Take new weights between two steps.

        Running requests keep what they have written; their cached keys and values are recomputed by their
        next forward, so no forward ever mixes two versions.

        Raises:
            CheckpointError: a tensor is missing, surplus or of another shape; the old weights stay whole.
        """
        try:
            self.model.take_weights(state)
        except CheckpointError as error:
            raise CheckpointError(f"weights {version}", error.got, error.allowed, error.fix) from error
        self.weight_version = version
        for sequence in self._scheduler.running.values():
            sequence.root = str(version)
            self._scheduler.drop_cache(sequence)
        self.clear_prefix_cache()

    def clear_prefix_cache(self) -> None:
        """Forget the blocks kept for reuse."""
        self._pool.forget()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One forward for every running request that has pages for it; updates of those that got something final or are
        watched."""
        started = time.perf_counter()
        self._admit()
        spans = self._scheduler.plan()
        if not spans:
            return []
        decided = self._static.run(spans) if self._static is not None else None
        sequences, reports = self._run(spans) if decided is None else decided
        self.forwards += 1
        for span in spans:
            self.rows += span.end - span.first
            span.sequence.forwards += 1
        updates = []
        for sequence, report in zip(sequences, reports, strict=True):
            request, live_end, view = sequence.request, sequence.live_end, None
            if request.watch and not report.failed:
                view = view_of(sequence, report, self.config.mask_token_id)
            outcome = advance(sequence, report, self._block_size(request))
            update = Update(request.request_id, "", 0)
            if outcome.finished or outcome.failed or outcome.text_end > sequence.text_end:
                update = self._settle(sequence, outcome, live_end, report.tokens)
            if view is not None:
                update = replace(update, canvas=view)
            if update.last or update.text or update.num_new_tokens or view is not None:
                updates.append(update)
        num_tokens = sum(update.num_new_tokens for update in updates)
        self._pace.note_step(num_tokens, len(sequences), time.perf_counter() - started)
        return updates

    def _run(self, spans: list[Span]) -> tuple[list[Running], list[BlockReport]]:
        """A forward over any spans; the deciding sequences and their reports."""
        forward = self._canvases.forward(spans)
        geometry = forward.geometry
        hidden = self.model(forward.tokens, forward.positions, forward.attention, forward.rows)[0]
        reports = self._canvases.decide(forward, hidden, self.model) if geometry.deciding else []
        if refreshed := [span.sequence for span in geometry.spans if span.refreshes]:
            self._note_drift(forward.attention.drift, refreshed)
        return geometry.deciding, reports

    def generate(self, requests: Sequence[Request]) -> list[Trajectory]:
        """Run requests to their end; trajectories in request order.

        Raises:
            RequestError: a bad request, before any starts; or one that failed, after all others ended.
            RuntimeError: the engine is busy with other requests, whose updates would be lost.
        """
        if self.has_work:
            raise RuntimeError("generate needs an engine without other requests")
        try:
            for request in requests:
                self.add(request)
        except RequestError:
            self._scheduler.waiting.clear()
            self._ids.clear()
            raise
        self._unread = {request.request_id for request in requests}
        last: dict[str, Update] = {}
        while self.has_work:
            last.update((update.request_id, update) for update in self.step() if update.last)
        ended = [last[request.request_id] for request in requests]
        errors = [update for update in ended if update.error]
        if errors:
            raise RequestError(
                f"request {errors[0].request_id}", errors[0].error, "finite logits", "check the weights"
            )
        return [update.trajectory for update in ended if update.trajectory is not None]

    def text_of(self, trajectory: Trajectory, stop: Sequence[str] = ()) -> str:
        """The completion as text, without the end of sequence.

        Args:
            stop: the request's stop strings. A token that holds both the last characters of the text and the
                first of a stop string is not among the tokens that count; with `stop` its share is kept.
        """
        ids = trajectory.completion_ids.tolist()
        if stop and trajectory.finish_reason == "stop":
            written = trajectory.canvas_ids.tolist()
            unwritten = (trajectory.step_map < 0).tolist()
            ids = written[: unwritten.index(True)] if True in unwritten else written
        if self.config.eos_token_id in ids:
            ids = ids[: ids.index(self.config.eos_token_id)]
        text = decode(self.tokenizer, ids)
        return text[: find_stop(text, stop)]

    def _block_size(self, request: Request) -> int:
        return request.policy.block_size or self.config.block_size

    def _admit(self) -> None:
        scheduler = self._scheduler
        while scheduler.free_slots and scheduler.waiting:
            request = scheduler.waiting.popleft()
            slot = scheduler.free_slots.pop()
            self._canvases.admit(slot, request)
            unread = request.request_id in self._unread
            stream = None if unread and not request.stop else TextStream(self.tokenizer, request.stop)
            size, prompt, root = self._block_size(request), len(request.prompt_ids), str(self.weight_version)
            end = prompt + request.max_tokens
            if self.config.attention_kind == "block_causal":
                live, window, live_end = prompt // size * size, 1 << 30, prompt // size * size + size
            else:
                live, window, live_end = prompt, end + len(request.suffix_ids), min(prompt + size, end)
            scheduler.join(
                Running(
                    request, slot, self.weight_version, stream, list(request.prompt_ids[:live]),
                    live, live_end, end, window, text_end=prompt, root=root, node=root,
                )
            )  # fmt: skip

    def _settle(self, sequence: Running, outcome: Outcome, live_end: int, block: list[int]) -> Update:
        """Text, token count and end of one sequence after a step that moved it; `block` is what the step left there."""
        name, prompt = sequence.request.request_id, len(sequence.request.prompt_ids)
        if outcome.failed:
            return self._fail(sequence, "the model's logits are not finite")
        sequence.text_end = outcome.text_end
        num_tokens = outcome.text_end - prompt + int(outcome.finished and outcome.eos)
        text, stopped = "", False
        if sequence.stream is not None:
            # A block that is done and followed by another has joined the ids already.
            ids = sequence.ids if sequence.live == live_end else sequence.ids + block
            ids = ids[prompt : outcome.text_end]
            try:
                piece = sequence.stream.feed(ids, num_tokens, outcome.finished)
            except ValueError as error:
                return self._fail(sequence, str(error))
            text, num_tokens, stopped = piece.text, piece.num_tokens, piece.stopped
        num_new, sequence.num_tokens = num_tokens - sequence.num_tokens, num_tokens
        if not (outcome.finished or stopped):
            return Update(name, text, num_new)
        reason: FinishReason = "stop" if stopped or outcome.eos else "length"
        trajectory = self._trajectory(sequence, live_end, num_tokens, reason)
        self._pace.note_answer(num_tokens, sequence.request.max_tokens)
        self._end(sequence)
        return Update(name, text, num_new, trajectory)

    def _fail(self, sequence: Running, error: str) -> Update:
        # Sharers of a poisoned page fail in this step, too; the last of them cleans it.
        pages = sequence.pages
        self._pool.withdraw(pages)
        self._end(sequence)
        self._store.wipe(self._pool.unused(pages))
        return Update(sequence.request.request_id, "", 0, error=error)

    def _end(self, sequence: Running) -> None:
        self._scheduler.leave(sequence)
        self._ids.discard(sequence.request.request_id)
        self._unread.discard(sequence.request.request_id)

    def _note_drift(self, drift: torch.Tensor, refreshed: list[Running]) -> None:
        for sequence, value in zip(refreshed, drift.tolist(), strict=True):
            sequence.drifts.append(value / self.config.num_hidden_layers)
            self._drift_sum += sequence.drifts[-1]
            self._drift_count += 1

    def _trajectory(
        self, sequence: Running, live_end: int, num_tokens: int, reason: FinishReason
    ) -> Trajectory:
        self.committed_tokens += num_tokens
        whole = sequence.request.suffix_ids or self.config.attention_kind == "bidirectional"
        end = sequence.end if whole else live_end
        return record(self._canvases, sequence, end, num_tokens, reason, self.weight_version)
