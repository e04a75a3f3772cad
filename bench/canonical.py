"""Judge published solutions, right and broken, in the sandbox: `python bench/canonical.py [--benchmarks FOLDER]`.

Writes bench/results/humaneval-canonical.json, and, with a folder of the published files,
bench/results/benchmarks-canonical.json: MBPP, MBXP in every language whose tools are here, HumanEval-infilling. Rows whose
own solution fails its own tests are listed by name. Two sandboxes; seconds are wall time of generating nothing but verdicts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fewstep.actors.verifier import LocalVerifier
from fewstep.pipelines.self_test import refuse_misjudged, self_test
from fewstep.pipelines.tasks.benchmarks import load_benchmark
from fewstep.pipelines.tasks.choice import BenchmarkChoice
from fewstep.platform.artifacts import atomic_write_text, git_commit, machine_info
from fewstep.platform.errors import FewstepError

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
NUM_SANDBOXES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--benchmarks", type=Path, help="folder of the published MBXP and infilling files")
    parser.add_argument("--languages", nargs="*", default=[], help="of MBXP; default: all in the folder")
    parser.add_argument("--skip-humaneval", action="store_true", help="only the files in the folder")
    arguments = parser.parse_args()
    try:
        with LocalVerifier(NUM_SANDBOXES) as verifier:
            if not arguments.skip_humaneval:
                humaneval(verifier)
            if arguments.benchmarks is not None:
                published(verifier, arguments.benchmarks, tuple(arguments.languages))
    except FewstepError as error:
        print(f"canonical: error: {error}", file=sys.stderr)
        return 2
    return 0


def humaneval(verifier: LocalVerifier) -> None:
    """HumanEval's 164 solutions, and three breakages of each."""
    benchmark = load_benchmark(BenchmarkChoice(name="humaneval"))
    report = self_test(benchmark, verifier)
    right, broken = report["solutions"]["python"], report["broken"]
    _write(
        "humaneval-canonical",
        {
            "canonical_passed": right["passed"],
            "mutated_passed": sum(found["passed"] for found in broken.values()),
            "num_canonical": right["num"],
            "num_mutated": sum(found["num"] for found in broken.values()),
            "seconds": {"value": right["seconds"], "unit": "s", "of": "the canonical solutions"},
            "verdicts_per_second": right["verdicts_per_second"],
            "outcomes": {
                "canonical": right["outcomes"],
                **{name: found["outcomes"] for name, found in broken.items()},
            },
        },
        verifier,
    )
    refuse_misjudged(benchmark, report)


def published(verifier: LocalVerifier, folder: Path, languages: tuple[str, ...]) -> None:
    """MBPP, MBXP and the infilling variants, as far as the folder and the toolchains go."""
    choices = [
        BenchmarkChoice(name="mbpp", path=folder),
        BenchmarkChoice(name="mbxp", path=folder, languages=languages),
        *(
            BenchmarkChoice(name="humaneval_infilling", path=folder, variant=variant)
            for variant in ("single_line", "multi_line", "random_span")
        ),
    ]
    benchmarks = [load_benchmark(choice) for choice in choices]
    reports = [self_test(benchmark, verifier) for benchmark in benchmarks]
    _write("benchmarks-canonical", {"benchmarks": {report["name"]: report for report in reports}}, verifier)
    for benchmark, report in zip(benchmarks, reports, strict=True):
        refuse_misjudged(benchmark, report)


def _write(name: str, record: dict[str, Any], verifier: LocalVerifier) -> None:
    facts = {
        "isolation": verifier.isolation,
        "num_sandboxes": NUM_SANDBOXES,
        "commit": git_commit(),
        "machine": machine_info(),
    }
    atomic_write_text(RESULTS / f"{name}.json", json.dumps({**record, **facts}, indent=2) + "\n")
    print(f"wrote bench/results/{name}.json", flush=True)


if __name__ == "__main__":
    sys.exit(main())
