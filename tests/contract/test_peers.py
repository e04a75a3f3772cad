"""bench/peers.py without a peer: settings, plan, weights, protocol, parity, store, report and tables.

Our adapter is driven as the benchmark drives it, and stands in for a peer where one is needed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.documents import fill, marks
from bench.side_by_side import measure, report, table
from bench.side_by_side.adapters.adapter import Trace
from bench.side_by_side.command import PAGE, main
from bench.side_by_side.parity import NEAR_TIE, Parity, compare
from bench.side_by_side.plan import (
    ADAPTERS,
    PEERS,
    Comparison,
    Mode,
    Peer,
    chosen_peers,
    comparisons,
    missing,
)
from bench.side_by_side.process import AdapterError, AdapterProcess
from bench.side_by_side.settings import QUICK, ModelSizes, Settings
from bench.side_by_side.store import Store
from bench.side_by_side.weights import write_models

from fewstep.kernels.model.checkpoint import load_model
from fewstep.kernels.model.transformer import masked_attention
from fewstep.platform.config import load_config
from fewstep.platform.errors import ConfigError, ResourceError

TINY = ModelSizes(
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=128,
    max_position_embeddings=128,
)
SETTINGS = Settings(
    model=TINY,
    prompt_tokens=32,
    max_tokens=64,
    parity_tokens=64,
    streams=(2,),
    repeats=1,
    dtype="float32",
)
EXACT = Mode("sdar", "exact", "static", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def machinery(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[measure.Machinery]:
    """The benchmark's own machinery; its `peers` folder holds an environment that is ours."""
    peers = tmp_path_factory.mktemp("peers")
    python = peers / "ours" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # A link would lose the environment that the interpreter finds beside itself.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    made = measure.Machinery(SETTINGS, peers, models, peers / "logs", lambda line: None)
    yield made
    made.close()


OURS_AS_PEER = Peer(
    "llada2",
    "ourselves",
    "ours_adapter.py",
    "ours",
    None,
    "sdar",
    "sdar",
    ("exact",),
    ("static",),
    batches=True,
)


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tokens_per_stp"):
        load_config(Settings, None, ["tokens_per_stp=2"])
    with pytest.raises(ConfigError, match="max_tokens must be a multiple of block_size 32"):
        load_config(Settings, None, ["max_tokens=100"])
    with pytest.raises(ConfigError, match="tokens_per_step must divide"):
        load_config(Settings, None, ["tokens_per_step=5"])
    assert load_config(Settings, None, QUICK).digest() != Settings().digest() == Settings().digest()


def test_the_default_model_is_large_enough_to_measure_arithmetic() -> None:
    sizes = Settings().model
    assert min(sizes.num_layer_parameters(grouped) for grouped in (True, False)) >= 100_000_000
    assert Settings().max_tokens >= 256
    assert ModelSizes(vocab_size=126_464).mask_token_id == 126_336


def test_every_peer_is_compared_in_each_of_its_modes() -> None:
    plan = comparisons(PEERS, Settings())
    for peer in PEERS:
        modes = [comparison.mode for comparison in plan if peer in comparison.peers]
        expected = {(cache, "static", streams) for cache in peer.caches for streams in (1, 8)}
        expected |= {(cache, "threshold", 1) for cache in peer.caches if "threshold" in peer.kinds}
        assert {(mode.cache, mode.kind, mode.streams) for mode in modes} == expected
        assert (ADAPTERS / peer.script).is_file()


def test_a_peer_that_is_not_there_says_what_is_missing(tmp_path: Path) -> None:
    llada = chosen_peers(["llada"])[0]
    assert missing(llada, tmp_path) == "no environment venv-4"
    python = tmp_path / "venv-4" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert missing(llada, tmp_path) == "no checkout LLaDA"
    (tmp_path / "LLaDA").mkdir()
    assert missing(llada, tmp_path) == "no checkout Fast-dLLM"
    with pytest.raises(ConfigError, match="fast_dllm"):
        chosen_peers(["fastdllm"])


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["--peers", str(tmp_path)],
        ["--peers", str(tmp_path), "--only", "sglang"],
        ["--table", "--out", str(tmp_path / "absent.json")],
    ):
        assert main([*arguments, "--work", str(tmp_path / "work")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "fix:" in lines[0]


def test_sdar_and_llada2_folders_hold_one_network(models: Path) -> None:
    tokens = torch.randint(0, TINY.vocab_size - 2, (1, 64), generator=torch.Generator().manual_seed(0))
    visible = torch.ones(1, 64, 64, dtype=torch.bool)
    logits = []
    for name in ("sdar", "llada2"):
        model, _ = load_model(models / name, torch.float32)
        with torch.inference_mode():
            hidden = model(tokens, torch.arange(64)[None], masked_attention(visible))
            logits.append(model.logits(hidden))
    finite = logits[0].isfinite()
    torch.testing.assert_close(logits[0][finite], logits[1][finite], rtol=1e-4, atol=1e-4)


def test_masked_positions_differ_in_token_and_confidence(machinery: measure.Machinery) -> None:
    """What the weights are made for: without it every comparison would hang on ties."""
    prompts = machinery.prompts(2, "spread")
    reply = machinery.ours("sdar", "float32").ask(**machinery.request(EXACT, prompts, 64, trace=True))
    logprobs = [row[3] for opening in reply["openings"][0] for row in opening]
    assert len(set(reply["tokens"][0])) > 8
    assert len({round(value, 3) for value in logprobs}) > 32
    assert min(logprobs) < -0.1 < max(logprobs)


def test_cached_and_uncached_have_parity_and_equal_forwards(machinery: measure.Machinery) -> None:
    ours = machinery.ours("sdar", "float32")
    prompts = machinery.prompts(2, "test")
    replies = []
    for cache in ("exact", "none"):
        mode = Mode("sdar", cache, "static", 2)  # type: ignore[arg-type]
        replies.append(ours.ask(**machinery.request(mode, prompts, 64, trace=True)))
    parity = compare(replies[0], replies[1], stale_cache=False, threshold=None, block_size=32)
    assert parity.verdict is True
    assert parity.fraction_equal == 1.0
    assert {reply["forwards"] for reply in replies} == {16}
    assert replies[0]["rows"] < replies[1]["rows"] == sum(2 * 8 * end for end in (64, 96))
    assert "seconds" not in replies[0]


def test_an_untraced_run_is_timed_and_its_floor_measured(machinery: measure.Machinery) -> None:
    ours = machinery.ours("sdar", "float32")
    reply = ours.ask(**machinery.request(EXACT, machinery.prompts(2, "timed"), 64))
    assert reply["seconds"] > 0
    assert "openings" not in reply
    assert ours.ask(op="measure")["seconds"] > 0


def test_a_refused_request_is_one_line_and_the_adapter_lives_on(machinery: measure.Machinery) -> None:
    ours = machinery.ours("sdar", "float32")
    with pytest.raises(AdapterError, match=r"^ours: RequestError: .*mask token"):
        ours.ask(**machinery.request(EXACT, [[TINY.mask_token_id] * 32], 64))
    assert ours.ask(**machinery.request(EXACT, machinery.prompts(1, "again"), 64))["forwards"] == 16


def test_an_adapter_that_dies_or_hangs_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dies, hangs = tmp_path / "dies.py", tmp_path / "hangs.py"
    dies.write_text("import sys; sys.stdin.readline(); sys.exit('no such model')")
    hangs.write_text("import sys; sys.stdin.read()")
    with (
        AdapterProcess("dead", Path(sys.executable), dies, log, {}) as process,
        pytest.raises(AdapterError, match="ended during load"),
    ):
        process.ask(op="load")
    assert "no such model" in log.read_text()
    with (
        AdapterProcess("mute", Path(sys.executable), hangs, log, {}, timeout_s=0.5) as process,
        pytest.raises(AdapterError, match="no answer to load"),
    ):
        process.ask(op="load")


def test_the_trace_finds_what_each_forward_opened() -> None:
    """Two forwards over a canvas of two blocks: the first opens position 1 of block 0, the second position 0."""
    mask, trace = 9, Trace([[5, 6]], mask_token_id=9, block_size=2)
    logits = torch.zeros(6, 10)
    logits[torch.arange(6), torch.tensor([0, 0, 1, 2, 3, 4])] = torch.tensor([9.0, 9, 5, 6, 7, 8])
    trace.add(0, 0, torch.tensor([5, 6, mask, mask, mask, mask]), logits)
    trace.add(0, 2, torch.tensor([mask, 2]), logits[2:4])  # a cache: rows of the block only
    first, second = trace.openings([[1, 2]])[0]
    assert [row[:3] for row in first] == [[0, 0, 1], [1, 1, 2]]
    assert [row[:3] for row in second] == [[0, 1, 1]]
    assert first[1][3] == pytest.approx(float(logits[3].double().log_softmax(-1)[2]))
    assert first[1][4] == pytest.approx(6.0)


def opened(*rows: tuple[int, int, float]) -> list[list[float]]:
    """An opening of (position, token, log-probability); nothing else was masked."""
    return [[position, 1, token, logprob, 1.0] for position, token, logprob in rows]


def verdict(ours: Any, peer: Any, stale_cache: bool = False, threshold: float | None = None) -> Parity:
    """Of one sequence with four tokens in one block."""

    def reply(openings: Any) -> dict[str, Any]:
        final = {row[0]: row[2] for opening in openings for row in opening if row[1]}
        return {"tokens": [[final.get(position, -1) for position in range(4)]], "openings": [openings]}

    return compare(reply(ours), reply(peer), stale_cache, threshold, block_size=4)


def test_equal_decoding_is_parity() -> None:
    both = [opened((0, 7, -0.1), (2, 8, -0.2)), opened((1, 7, -0.1), (3, 5, -0.2))]
    noisy = [opened((0, 7, -0.1), (2, 8, -0.2003)), both[1]]
    parity = verdict(both, noisy)
    assert parity.verdict is True
    assert parity.fraction_equal == 1.0
    assert parity.max_logprob_difference == pytest.approx(3e-4)


@pytest.mark.parametrize(("margin", "expected"), [(NEAR_TIE / 2, True), (0.5, False)])
def test_another_token_is_forgiven_where_two_logits_tie(margin: float, expected: bool) -> None:
    ours = [opened((0, 7, -0.1))]
    peer = [[[0, 1, 6, -0.1, margin]]]
    parity = verdict(ours, peer)
    assert parity.verdict is expected
    assert parity.differences[0].gap == margin
    assert parity.fraction_equal == 0.75


@pytest.mark.parametrize(("lead", "expected"), [(NEAR_TIE / 2, True), (0.01, False)])
def test_another_position_is_forgiven_where_two_confidences_tie(lead: float, expected: bool) -> None:
    ours = [opened((0, 7, -0.1)), opened((1, 6, -0.1))]
    peer = [[[0, 0, 7, -0.1 - lead, 1.0], [1, 1, 6, -0.1, 1.0]], opened((0, 7, -0.1))]
    assert verdict(ours, peer).verdict is expected


@pytest.mark.parametrize(("distance", "expected"), [(NEAR_TIE / 2, True), (0.01, False)])
def test_a_threshold_is_missed_by_a_hair_or_wrongly(distance: float, expected: bool) -> None:
    at = math.log(0.9)
    ours = [opened((0, 7, -0.05), (1, 6, at))]
    peer = [[[0, 1, 7, -0.05, 1.0], [1, 0, 6, at - distance, 1.0]], opened((1, 6, -0.05))]
    assert verdict(ours, peer, threshold=0.9).verdict is expected


def test_a_static_schedule_that_opens_another_number_is_wrong() -> None:
    ours = [opened((0, 7, -0.1), (1, 6, -0.1))]
    peer = [[[0, 1, 7, -0.1, 1.0], [1, 0, 6, -0.1, 1.0]], opened((1, 6, -0.1))]
    assert verdict(ours, peer).verdict is False


def test_stale_caches_may_part_behind_the_first_forward_of_a_block() -> None:
    ours = [opened((0, 7, -0.1)), opened((1, 6, -0.1))]
    peer = [opened((0, 7, -0.1)), [[1, 1, 5, -0.1, 3.0]]]
    assert verdict(ours, peer, stale_cache=True).verdict == "approximate"
    assert verdict(ours, peer, stale_cache=False).verdict is False
    assert verdict(ours[1:], peer[1:], stale_cache=True).verdict is False


def test_equal_openings_of_unequal_answers_are_not_parity() -> None:
    ours = {"tokens": [[1, 2]], "openings": [[]]}
    assert compare(ours, {"tokens": [[1, 3]], "openings": [[]]}, True, None, 4).verdict is False


def test_finished_comparisons_survive_a_kill_and_other_settings_do_not_see_them(tmp_path: Path) -> None:
    path = tmp_path / "finished.jsonl"
    store = Store(path, "these settings", resume=True)
    store.put("parity/a", {"verdict": True})
    store.put("parity/a", {"verdict": False})
    store.put("timed/failed", {"error": "ended"})
    with path.open("a") as file:
        file.write('{"stamp": "these settings", "key": "par')
    again = Store(path, "these settings", resume=True)
    assert again["parity/a"] == {"verdict": False}
    assert "timed/failed" not in again
    assert "parity/a" not in Store(path, "other settings", resume=True)
    again.put("timed/b", {})
    assert "timed/b" in Store(path, "these settings", resume=True)
    assert "parity/a" not in Store(path, "these settings", resume=False)


@pytest.fixture(scope="module")
def result(machinery: measure.Machinery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run with ourselves as the only peer."""
    plan = [Comparison(EXACT, (OURS_AS_PEER,))]
    store = Store(tmp_path_factory.mktemp("work") / "finished.jsonl", "test", resume=False)
    measure.run(machinery, plan, store)
    return {
        "rows": report.rows_of(plan, store, SETTINGS),
        "loops": [],
        "autoregressive": [],
        "not_run": [{"peer": "sdar", "reason": "no checkout SDAR"}],
        "settings": SETTINGS.model_dump(mode="json"),
        "parameters": {name: {"layers": 1, "all": 2} for name in ("llada", "sdar")},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34},
        "commit": "0123456789abcdef",
        "total_seconds": 60.0,
    }


def test_a_run_against_ourselves_has_parity_and_every_figure(result: dict[str, Any]) -> None:
    (row,) = result["rows"]
    assert row["parity"] is True
    assert row["ratio"] == pytest.approx(row["our_tok_s"] / row["tok_s"])
    assert row["tpf"] == row["peer_tpf"] == 4.0
    assert row["forwards"] == row["peer_forwards"] == 16
    assert row["floor_fraction"] > 0


def test_the_page_gets_its_tables_and_keeps_the_rest(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    fill(page, table.MARKS, table.section(result))
    once = page.read_text(encoding="utf-8")
    fill(page, table.MARKS, table.section(result))
    assert page.read_text(encoding="utf-8") == once
    assert "| dllm LLaDA2 sampler | exact | static_4 | 2 |" in once
    assert "Not run: SDAR generate.py (no checkout SDAR)." in once
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(marks(table.MARKS)[0])
    assert once.startswith(before)
    assert once.endswith(rest.partition(marks(table.MARKS)[1])[2])


def test_a_row_without_parity_has_no_speed(machinery: measure.Machinery, tmp_path: Path) -> None:
    plan = [Comparison(EXACT, (OURS_AS_PEER,))]
    store = Store(tmp_path / "finished.jsonl", "test", resume=False)
    store.put(f"parity/llada2/{EXACT.label}", {"verdict": False, "fraction_equal": 0.5})
    measure.measure(machinery, plan, store)
    assert store.values("timed/") == []
    (row,) = report.rows_of(plan, store, SETTINGS)
    assert (row["parity"], row["ratio"], row["tok_s"], row["our_tok_s"]) == (False, None, None, None)
    assert "| - | - | - | - | - | - | - | **no**: the tokens differ |" in table.peers_table([row])


def test_a_page_without_markers_and_another_file_are_refused(result: dict[str, Any], tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.json"
    page.write_text("no markers")
    other.write_text(json.dumps({"rows": []}))
    with pytest.raises(ResourceError, match="marks"):
        fill(page, table.MARKS, table.section(result))
    with pytest.raises(ResourceError, match="loops"):
        table.read_result(other)
