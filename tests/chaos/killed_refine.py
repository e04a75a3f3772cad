"""A small `fewstep refine` with real Ray, one of whose processes is killed with signal 9 at a place drawn from a seed.

The tests and bench/chaos.py share it. A place is a line the job prints and a share of a step's time after it, so that a
kill falls into rollouts, verdicts, updates, pushes and checkpoints alike.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cluster.session import process_start, process_tree
from fewstep.kernels.model.checkpoint import load_state, state_checksum
from fewstep.kernels.model.config import ModelConfig
from fewstep.platform.mlflow_runs import RunStore
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.rng import generator
from fewstep.platform.trajectories import read_rollouts

STEPS = 4
# One replica: a forward's rounding depends on who shares it, and two replicas share the work by the clock.
JOB = (
    f"steps={STEPS}", "checkpoint_every=1", "prompts_per_step=6", "group_size=2", "max_tokens=40", "num_eval_tasks=4",
    "num_replicas=1", "num_verifiers=1", "sweep.thresholds=[0.9]", "sweep.tokens_per_step=[]", "trainer.num_ranks=1",
    "trainer.precision=fp32", "warmup_steps=1",
)  # fmt: skip
TITLES = {"replica": "ray::Replica", "verifier": "ray::VerifierWorker", "trainer": "ray::TrainerRank"}
"""Victims by the title of their process; the driver is the process that was started."""
VICTIMS = (*TITLES, "driver")
STEP_S = 1.0
"""About as long as a step takes, with its checkpoint."""
ORPHANS_S = 15.0
"""How long what belongs to a job may outlive it."""
RUN_S = 300.0


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when.

    Attributes:
        step: steps done before it; 0 = while the unrefined model is measured.
        delay_s: after the line that says so.
    """

    victim: str
    step: int
    delay_s: float

    @property
    def mark(self) -> str:
        """The beginning of the line it follows."""
        return f"refine {self.step:>4}/{STEPS}" if self.step else "frontier before"


def drawn(seed: int) -> Kill:
    """The kill of a seed: each four seeds in a row have every kind of victim, in a drawn order."""
    order = generator("chaos-victim", seed // len(VICTIMS)).permutation(len(VICTIMS))
    draws = generator("chaos-place", seed)
    step, delay_s = int(draws.integers(0, STEPS)), STEP_S * float(draws.random())
    return Kill(VICTIMS[int(order[seed % len(VICTIMS)])], step, round(delay_s, 3))


@dataclass(frozen=True)
class Ended:
    """One process of `fewstep refine`, from start to end.

    Attributes:
        killed: whether the victim was there to be killed.
        left: processes of the job that were there ORPHANS_S after its end, by their command line, and its folders.
    """

    code: int
    lines: list[str]
    killed: bool
    left: list[str]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith(("fewstep: error", "Traceback"))]


@dataclass(frozen=True)
class Result:
    """What a finished job came to, in the terms that two runs are compared by."""

    order: list[list[tuple[str, int, int]]]
    answers: list[list[str]]
    weights: str

    @staticmethod
    def of(out: Path) -> Result:
        """Read from a job's folder; steps in the order of their files' names."""
        steps = [read_rollouts(path) for path in sorted((out / "rollouts").iterdir())]
        model = out / "model"
        return Result(
            [[(one.task_id, one.group_id, one.sample) for one in step] for step in steps],
            [[one.text for one in step] for step in steps],
            state_checksum(load_state(model, ModelConfig.load(model))),
        )


def run_refine(out: Path, kill: Kill | None = None) -> Ended:
    """The job in `out`, tracked beside it, to its end, and what is left of it afterwards."""
    with _short_folder() as scratch:
        command = [sys.executable, "-m", "fewstep", "refine", "--ray-cpus", "2", "--out", str(out)]
        command += [f"tracking_uri={sqlite_uri(out.parent)}", *JOB]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
        log = scratch / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        family = _Family(process.pid)
        try:
            killed = _wait(process, log, family, kill)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        lines = log.read_text().splitlines()
        log.unlink()
        return Ended(process.returncode, lines, killed, family.left_after(scratch))


def tracked(out: Path) -> dict[str, Any]:
    """What the store says of a folder's job: its newest run's status, sessions after the first and told steps, and the
    statuses of the runs before it (a job that has no checkpoint yet starts over, as a new run).

    As it is read the run of a process that is gone is closed.
    """
    uri = sqlite_uri(out.parent)
    named = [run for run in RunStore(uri).runs(limit=1000) if run.name.startswith(f"refine-{out.name}-")]
    newest, client = named[0], open_client(uri, create=False)
    return {
        "status": newest.status,
        "resumed": int(newest.tags.get("fewstep.resumed", "0")),
        "failure": newest.tags.get("fewstep.failure", ""),
        "steps": [point.step for point in client.get_metric_history(newest.run_id, "reward/pass_rate")],
        "earlier": [run.status for run in named[1:]],
    }


class _Family:
    """A job's processes, those that have ended included; noted while the driver lives: what a dead one has started is
    nobody's child."""

    def __init__(self, driver: int) -> None:
        self._driver, self._next_look = driver, 0.0
        self._started: dict[int, str] = {}
        self._titles: dict[int, str] = {}

    def look(self, *, now: bool = False) -> None:
        """Once a second, or now: every look reads all of /proc several times."""
        if now or time.monotonic() >= self._next_look:
            self._started |= process_tree({self._driver})
            self._titles |= {pid: title for pid in self._started if (title := _title(pid))}
            self._next_look = time.monotonic() + 1.0

    def left_after(self, scratch: Path) -> list[str]:
        """What is still there when ORPHANS_S have passed; nothing as soon as nothing is."""
        deadline = time.monotonic() + ORPHANS_S
        while True:
            alive = [
                self._titles.get(pid, str(pid))
                for pid, start in self._started.items()
                if process_start(pid) == start
            ]
            left = [*alive, *(path.name for path in scratch.glob("fewstep-*"))]
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.1)


def _wait(process: subprocess.Popen[bytes], log: Path, family: _Family, kill: Kill | None) -> bool:
    """Wait for the job's end; whether there was somebody to kill at the place."""
    killed, due = False, float("inf")
    deadline = time.monotonic() + RUN_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{RUN_S:g} s passed; the job's last words: {log.read_text()[-2000:]}")
        family.look()
        if kill is not None and not killed:
            if due == float("inf") and _has_line(log, kill.mark):
                due = time.monotonic() + kill.delay_s
            if time.monotonic() >= due:
                family.look(now=True)
                killed = _strike(process.pid, kill.victim)
        time.sleep(0.02)
    return killed


def _strike(driver: int, victim: str) -> bool:
    """Kills; False if there is no such process (it is between two lives, or the job is at its end)."""
    pids = [driver]
    if victim != "driver":
        pids = [pid for pid in process_tree({driver}) if _title(pid).startswith(TITLES[victim])]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _has_line(log: Path, beginning: str) -> bool:
    return any(line.startswith(beginning) for line in log.read_text().splitlines())


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def _short_folder() -> Iterator[Path]:
    """A temporary folder of the job's own, so short that Ray's sockets fit below it."""
    folder = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
