"""`fewstep sweep`: trials as Ray tasks, each a run nested under the sweep's, the whole resumable.

A trial is the job itself, with its own folder, checkpoints and run; the task is its driver, and the one writer of its
run. What has been done is read from `sweep.json`, which is replaced whole after every trial.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from fewstep.actors.placement import require_room
from fewstep.cluster.sweep_settings import SweepConfig, Trial, trials_of
from fewstep.pipelines.run_comparison_figure import draw_comparison
from fewstep.pipelines.run_record import folder_record
from fewstep.pipelines.run_table import aligned, duration
from fewstep.pipelines.tracked_run import RunPlan, tracked_run
from fewstep.platform.artifacts import atomic_write_text
from fewstep.platform.config import Config
from fewstep.platform.errors import ConfigError, FewstepError
from fewstep.platform.mlflow_store import project_uri
from fewstep.platform.tracking import Tracker

STATE_FILE = "sweep.json"
_LOOK_S = 5.0
_CANCEL_S = 60.0


def run(config: SweepConfig) -> None:
    """Runs what is left of the sweep, prints a table, writes sweep.json and, for refinements, sweep.png.

    Raises:
        ConfigError: a trial that its job would refuse, or another sweep in `out`; before anything starts.
        ResourceError: the cluster has no room for `concurrent` trials.
        FewstepError: trials failed; the others are done, and the same command tries the failed ones again.
    """
    uri = project_uri(config.tracking_uri)
    config = config.model_copy(update={"tracking_uri": uri, "out": config.out.resolve()})
    trials = trials_of(config)
    state = _read_state(config, trials)
    need = max(getattr(trial.config, "total_cpus", 1.0) for trial in trials)
    require_room("trials", config.concurrent, need)
    plan = RunPlan(
        kind="sweep", config=config, out=config.out, tracking_uri=uri, experiment=config.experiment,
        description=f"A sweep of `fewstep {config.command}`: {len(trials)} trials.", resumed=bool(state),
        required=True, tags={"fewstep.num_trials": str(len(trials))},
    )  # fmt: skip
    with tracked_run(plan) as tracker:
        for trial in trials:
            state.setdefault(
                trial.name, {"number": trial.number, "values": trial.values, "status": "waiting"}
            )
        _run_trials(config, trials, state, tracker)
        _conclude(config, trials, state, tracker)
    failed = [name for name, own in state.items() if own["status"] == "failed"]
    if failed:
        raise FewstepError(
            f"{len(failed)} of {len(trials)} trials failed, the first: {failed[0]}: {state[failed[0]]['error']} "
            f"(log: {config.out / 'trials' / failed[0] / 'log.txt'}); the same command tries them again"
        )


def _read_state(config: SweepConfig, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """What an earlier start of this sweep left; trials that did not finish are waiting again."""
    path = config.out / STATE_FILE
    if not config.resume or not path.is_file():
        return {}
    saved = json.loads(path.read_text())
    if saved["fingerprint"] != _fingerprint(config):
        raise ConfigError(
            "out", str(config.out), "a folder without another sweep",
            "choose another out, or resume=false to start over",
        )  # fmt: skip
    state: dict[str, dict[str, Any]] = saved["trials"]
    for own in state.values():
        if own["status"] != "finished":
            own["status"] = "waiting"
    done = sum(own["status"] == "finished" for own in state.values())
    print(f"going on with the sweep in {config.out}: {done} of {len(trials)} trials are done", flush=True)
    return state


def _fingerprint(config: SweepConfig) -> str:
    """What decides which trials there are; how many run at once, and where they are tracked, does not."""
    names = ("command", "base", "grid", "random", "num_draws", "seed")
    return config.model_dump_json(include=set(names))


def _write_state(config: SweepConfig, state: Mapping[str, Any]) -> None:
    content = {"fingerprint": _fingerprint(config), "trials": state}
    atomic_write_text(config.out / STATE_FILE, json.dumps(content, indent=2) + "\n")


def _run_trials(
    config: SweepConfig, trials: Sequence[Trial], state: dict[str, dict[str, Any]], tracker: Any
) -> None:
    """Keeps `concurrent` trials going until none is left; on the way out, whatever the reason, ends those that run."""
    waiting = [trial for trial in trials if state[trial.name]["status"] != "finished"]
    running: dict[Any, Trial] = {}
    # A fresh process a trial: what one leaves in memory must not reach the next.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(run_trial)
    told: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < config.concurrent:
                trial = waiting.pop(0)
                tags = {"mlflow.parentRunId": tracker.run_id, "fewstep.trial": trial.name}
                state[trial.name]["status"] = "running"
                print(f"trial {trial.number + 1}/{len(trials)}  {trial.name}", flush=True)
                told[trial.name] = _last_line(trial)  # an earlier start's
                running[task.remote(config.command, trial.config, tags)] = trial
                _write_state(config, state)
            done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S)
            for trial in running.values():
                _tell_progress(trial, told)
            for reference in done:
                trial = running.pop(reference)
                _take_in(config, trial, _outcome(reference), state, tracker)
    finally:
        _cancel(list(running))


def _outcome(reference: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:  # the trial's process is gone
        reason = str(error).strip().splitlines()
        return {"status": "failed", "error": reason[0] if reason else type(error).__name__}
    return found


def _take_in(
    config: SweepConfig, trial: Trial, outcome: Mapping[str, Any], state: dict[str, dict[str, Any]], tracker: Tracker
) -> None:  # fmt: skip
    goal, _ = config.best_by
    own = state[trial.name]
    own.update({key: value for key, value in outcome.items() if key != "report"})
    if own["status"] == "finished":
        own["goal"] = _dotted(outcome["report"], goal)
        if isinstance(own["goal"], int | float):
            tracker.log_metrics({f"sweep/{goal}": float(own["goal"])}, trial.number)
    _write_state(config, state)
    tracker.log_table("trials", _rows(state, goal))
    said = f"{goal} {own['goal']}" if own["status"] == "finished" else f"FAILED: {own['error']}"
    print(
        f"trial {trial.number + 1}  {own['status']} after {duration(own.get('seconds'))}  {said}", flush=True
    )


def _conclude(
    config: SweepConfig, trials: Sequence[Trial], state: Mapping[str, dict[str, Any]], tracker: Any
) -> None:
    goal, more = config.best_by
    ranked = [own for own in state.values() if isinstance(own.get("goal"), int | float)]
    ranked.sort(key=lambda own: own["goal"], reverse=more)
    if ranked:
        best = next(name for name, own in state.items() if own is ranked[0])
        tracker.set_tags({"fewstep.best_trial": best, "fewstep.best_run": ranked[0].get("run_id", "")})
    print("\n" + "\n".join(_table(state, goal, more)), flush=True)
    if config.command == "refine" and ranked:
        folders = [trial.config.out for trial in trials if state[trial.name]["status"] == "finished"]  # type: ignore[attr-defined]
        records = {folder.name: folder_record(folder) for folder in folders}
        draw_comparison(config.out / "sweep.png", records)
        tracker.log_figure("sweep", config.out / "sweep.png")
    tracker.log_artifact(config.out / STATE_FILE)


def _rows(state: Mapping[str, dict[str, Any]], goal: str) -> list[dict[str, Any]]:
    return [
        {**own["values"], goal: own.get("goal"), "status": own["status"], "seconds": own.get("seconds"), "run": own.get("run_id")}
        for own in state.values()
    ]  # fmt: skip


def _table(state: Mapping[str, dict[str, Any]], goal: str, more: bool) -> list[str]:
    def rank(own: Mapping[str, Any]) -> float:
        value = own.get("goal")
        return (-float(value) if more else float(value)) if isinstance(value, int | float) else float("inf")

    rows = [
        [
            str(own["number"]), *map(str, own["values"].values()),
            f"{own['goal']:.4g}" if isinstance(own.get("goal"), int | float) else "-",
            own["status"], duration(own.get("seconds")), str(own.get("run_id", "-"))[:8],
        ]
        for own in sorted(state.values(), key=rank)
    ]  # fmt: skip
    keys = next(iter(state.values()))["values"]
    return aligned([["trial", *keys, goal, "status", "took", "run"], *rows])


def _tell_progress(trial: Trial, told: dict[str, str]) -> None:
    """The last line of a trial's log, when it is a new one."""
    line = _last_line(trial)
    if line != told[trial.name]:
        told[trial.name] = line
        print(f"  {trial.number:03d}  {line.strip()}", flush=True)


def _last_line(trial: Trial) -> str:
    log = trial.config.out / "log.txt"  # type: ignore[attr-defined]
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return str(lines[-1]) if lines else ""


def _cancel(references: list[Any]) -> None:
    """Interrupts trials as Ctrl-C would, and waits until they have closed their runs."""
    for reference in references:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(reference, force=False, recursive=False)
    if references:
        ray.wait(references, num_returns=len(references), timeout=_CANCEL_S)


def _dotted(report: Mapping[str, Any], key: str) -> Any:
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def run_trial(command: str, config: Config, tags: Mapping[str, str]) -> dict[str, Any]:
    """One trial, in a process of its own; what it prints goes to log.txt in its folder.

    Returns:
        status (`finished` or `failed`), seconds, run_id, and `report` or `error`.
    """
    folder = Path(config.out)  # type: ignore[attr-defined]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (folder / "log.txt").open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            report = _run_job(command, config, tags)
        except Exception as error:  # noqa: BLE001 - whatever ends a trial must not end the sweep
            traceback.print_exc(file=log)
            return {
                "status": "failed",
                "error": " ".join(str(error).split())[:300],
                "seconds": time.monotonic() - started,
            }
        finally:
            sys.stdout.flush()
    identity = json.loads((folder / "tracking.json").read_text())
    return {
        "status": "finished",
        "seconds": time.monotonic() - started,
        "run_id": identity["run_id"],
        "report": report,
    }


def _run_job(command: str, config: Config, tags: Mapping[str, str]) -> dict[str, Any]:
    if command == "refine":
        from fewstep.pipelines.refine_job import run as run_refine

        return run_refine(config, tags).report  # type: ignore[arg-type]
    from fewstep.pipelines.pretrain import run as run_pretrain

    run_pretrain(config, tags)  # type: ignore[arg-type]
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()  # type: ignore[attr-defined]
    last: dict[str, Any] = json.loads(lines[-1])
    return last
