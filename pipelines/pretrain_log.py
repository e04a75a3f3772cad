"""What pre-training reports: a line on the terminal and one in metrics.jsonl every so many steps, and the tracker's metrics."""

from __future__ import annotations

import json
import time
from collections import Counter

from fewstep.actors.trainer_rank import Metrics
from fewstep.pipelines.curriculum import Plan
from fewstep.pipelines.objectives.denoise import LEVELS
from fewstep.pipelines.progress import kept_rows
from fewstep.pipelines.settings import PretrainConfig
from fewstep.platform.errors import UserError
from fewstep.platform.tracking import Tracker

REPORT_EVERY, MIN_REPORTS = 50, 20
_SUMMED = (
    "nll_sum",
    "targets",
    "rows",
    "flops",
    *(f"{sum_}_{name}" for name in LEVELS for sum_ in ("nll_sum", "targets")),
)


class PretrainLog:
    """Sums the steps between two reports.

    Args:
        first: the step training goes on from; later lines of an earlier attempt are dropped.
        matmul_rate: FLOP/s of matrix products on the trainer's ranks, what `mfu` is a share of.
    """

    def __init__(self, config: PretrainConfig, first: int, tracker: Tracker, matmul_rate: float) -> None:
        self._config, self._tracker, self._matmul_rate = config, tracker, matmul_rate
        self._every = min(REPORT_EVERY, max(1, config.steps // MIN_REPORTS))
        self._start = self._since = time.monotonic()
        self._path = config.out / "metrics.jsonl"
        self.rows = kept_rows(self._path, first)
        self._before_s = self.rows[-1]["seconds"] if self.rows else 0.0
        self._sums, self._num_skipped = Counter[str](), 0
        self._last: Metrics = {}

    def step(self, step: int, plan: Plan, metrics: Metrics) -> None:
        """Takes one step's metrics, and reports where it is time.

        Raises:
            UserError: the run ends and no gradient was finite.
        """
        if metrics["skipped"]:
            self._num_skipped += 1
            print(f"step {step + 1}: the gradient is not finite; skipped", flush=True)
        else:
            self._sums.update({name: metrics.get(name, 0.0) for name in _SUMMED})  # type: ignore[misc]
            self._last = metrics
        last = step + 1 == self._config.steps
        if not self._sums["targets"]:
            if last and not self.rows:
                raise UserError("gradient", "not finite in any step", "finite ones", "lower learning_rate")
            return
        if (step + 1) % self._every == 0 or last:
            self._report(step + 1, plan)

    def _report(self, step: int, plan: Plan) -> None:
        now, sums = time.monotonic(), self._sums
        seconds, passed = self._before_s + now - self._start, now - self._since
        row = {
            "step": step,
            "samples": step * self._config.batch_size,
            "seconds": round(seconds, 1),
            "block_size": plan.block_size,
            "edits": plan.edits,
            "learning_rate": plan.learning_rate,
            "nll_per_token": sums["nll_sum"] / sums["targets"],
            **{
                f"nll_{name}": sums[f"nll_sum_{name}"] / sums[f"targets_{name}"]
                for name in LEVELS
                if sums[f"targets_{name}"]
            },
            "loss": self._last["loss"],
            "grad_norm": self._last["grad_norm"],
            "skipped": self._num_skipped,
            "rows_per_second": sums["rows"] / passed,
            "mfu": sums["flops"] / passed / self._matmul_rate,
        }
        self._sums, self._num_skipped, self._since = Counter(), 0, now
        self.rows.append(row)
        self._tracker.log_metrics(
            {f"train/{k}": v for k, v in row.items() if k not in ("step", "edits")}, step
        )
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"step {step:>6}/{self._config.steps}  block {plan.block_size:>2}  nll {row['nll_per_token']:.4f}"
            f"  grad {row['grad_norm']:.2f}  {row['rows_per_second']:.0f} rows/s  mfu {row['mfu']:.2f}"
            f"  {seconds / 60:.1f} min",
            flush=True,
        )
