"""`bench/gpu.sh`: every kernel on a real GPU, checked, then timed against its floor and against torch; under 8 minutes.

1. Versions and the device; without CUDA one line and exit code 2.
2. The tests of kernels and of the engine's static step on the device, compiled and not interpreted.
3. Every case of `bench/cases.py`: fused against the reference, then medians beside eager torch, torch.compile and the
   floor (bytes over the rate of a large copy, or FLOP over the rate of a large product, both measured first).
4. A denoising step of an 8 B-shaped model at 1x32, 4x32 and 16x32 rows, eager and as a CUDA graph, against the time in
   which its weights can be read.
5. The engine itself over that model with 1, 4, 16 and 64 requests: tokens per second and milliseconds per forward, its
   static steps as CUDA graphs beside the forward of any shape.
6. The table, and bench/results/gpu-NAME.json.

A case that gives wrong numbers gets no time. Exit code 1 if a test failed, a case is wrong or something was left out for
time. `--smoke` runs all of it but the tests on a CPU with tiny shapes and reports no times: it shows that this file works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NEEDED = ("torch", "triton")
PARTS = {
    "tests": ("pytest", "hypothesis", "pydantic", "tokenizers", "psutil"),
    "kernels": (),
    "model": ("pydantic",),
    "engine": ("pydantic", "tokenizers", "psutil"),
}
STEPS = ((1, 32), (4, 32), (16, 32))
SEQUENCES = (1, 4, 16, 64)
PREFIX = 1024


def refuse(reason: str) -> int:
    print(f"gpu: error: {reason}", file=sys.stderr)
    return 2


@dataclass
class Report:
    """What goes into the JSON file; rows have value, unit and settings."""

    seconds_allowed: float
    started: float = field(default_factory=time.perf_counter)
    header: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        return self.seconds_allowed - (time.perf_counter() - self.started)

    def complain(self, what: str) -> None:
        print(f"  ! {what}", flush=True)
        self.complaints.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, no times")
    parser.add_argument("--name", help="of bench/results/gpu-NAME.json; default: the device's")
    parser.add_argument("--out", type=Path, help="result file, instead of --name")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=460.0, help="after which nothing new is begun")
    arguments = parser.parse_args()
    if missing := absent(NEEDED):
        return refuse(f"{sys.executable} has no {', '.join(missing)}; set PYTHON to one that has")
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        return refuse(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA device (--smoke needs none)"
        )
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        return refuse(f"--only: no such part: {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    return run(arguments, parts)


def absent(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run(arguments: argparse.Namespace, parts: list[str]) -> int:
    import torch

    from fewstep.platform.artifacts import atomic_write_text

    smoke = arguments.smoke
    device = torch.device("cpu" if smoke else "cuda")
    report = Report(arguments.seconds)
    report.header = describe(device)
    print(json.dumps(report.header), flush=True)
    peaks = None
    if not smoke:
        from gpu_timing import measure_peaks

        peaks = measure_peaks(device)
        report.header["copy_bytes_per_s"] = round(peaks.bytes_per_s)
        report.header["matmul_flop_per_s"] = round(peaks.flop_per_s)
        print(f"copy {peaks.bytes_per_s / 1e12:.2f} TB/s, product {peaks.flop_per_s / 1e12:.0f} TFLOP/s")
    for part in parts:
        if missing := absent(PARTS[part]):
            report.complain(f"{part}: left out, {sys.executable} has no {', '.join(missing)}")
        elif part == "tests" and not smoke:
            run_tests(report)
        elif part == "kernels":
            run_cases(report, device, peaks)
        elif part == "model":
            run_model(report, device, peaks)
        elif part == "engine":
            run_engine(report, device, peaks is None)
    print_table(report)
    name = arguments.name or re.sub(r"\W+", "-", report.header["device"]).strip("-").lower()
    path = arguments.out or RESULTS / f"gpu-{name}.json"
    body = {**report.header, "rows": report.rows, "complaints": report.complaints}
    atomic_write_text(path, json.dumps(body, indent=1) + "\n")
    print(
        f"wrote {path} after {time.perf_counter() - report.started:.0f} s; complaints: {len(report.complaints)}"
    )
    return 1 if report.complaints else 0


def describe(device: Any) -> dict[str, Any]:
    """Versions, machine and commit."""
    import torch
    import triton

    from fewstep.platform.artifacts import git_commit, machine_info

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": sys.version.split()[0],
        "machine": machine_info(),
        "commit": git_commit(),
        "smoke": not cuda,
    }


def run_tests(report: Report) -> None:
    """The tests that follow `tests.kernels.device.DEVICE`, and those marked gpu, in a process of their own."""
    folders = [ROOT / "tests" / "kernels", ROOT / "tests" / "actors" / "engine"]
    files = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in sorted(folder.glob("test_*.py"))
        if re.search(r"DEVICE|attention_cases|mark\.gpu", path.read_text())
    ]
    # Without the project's own settings: they need plug-ins that this machine may lack.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-q", "--no-header"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore", *files]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
    print(f"tests: {len(files)} files", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        report.complain("tests: not done after 240 s")
        return
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) or "  no failures")
    print(f"  {lines[-1]}", flush=True)
    report.header["tests"] = lines[-1].strip("= ")
    if done.returncode != 0:
        report.complain(f"tests: {lines[-1].strip('= ')}")


def run_cases(report: Report, device: Any, peaks: Any) -> None:
    """Check, then time, every case."""
    from cases import load_cases

    for case in load_cases(smoke=peaks is None):
        row: dict[str, Any] = {"op": case.op, "name": case.name, "settings": dict(case.settings)}
        implementation = "reference" if peaks is None else "fused"
        # Inputs are made anew for each: an op may write into them.
        try:
            got = case.run(case.make(device, 0), implementation)
            complaint = case.complaint(got, case.rival(case.make(device, 0)))
        except Exception as error:  # noqa: BLE001 -- the other cases' numbers are still wanted
            complaint = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if complaint is not None:
            report.complain(f"{case.op}, {case.name}: {complaint}")
            continue
        if peaks is not None:
            time_case(report, case, row, device, peaks)
        report.rows.append(row)


def time_case(report: Report, case: Any, row: dict[str, Any], device: Any, peaks: Any) -> None:
    """Median microseconds of the fused op and of its rivals into `row`."""
    import torch
    from gpu_timing import rotation, time_call

    if report.left_s() < 0:
        report.complain(f"{case.op}, {case.name}: left out, {report.seconds_allowed:.0f} s are over")
        return
    inputs = [case.make(device, seed) for seed in range(rotation(case.num_bytes))]
    floor = peaks.floor_s(case.num_bytes, case.flop) * 1e6
    row |= {"unit": "us", "num_bytes": case.num_bytes, "flop": case.flop, "floor": round(floor, 3)}

    def timed(name: str, call: Callable[[Any], object]) -> None:
        timing = time_call(call, inputs)
        row[name], row[f"{name}_by"] = round(timing.seconds * 1e6, 3), timing.how

    timed("value", lambda one: case.run(one, "fused"))
    timed("eager", case.rival)
    if case.compiled and report.left_s() > 60:
        try:
            timed("compiled", torch.compile(case.rival, dynamic=False))
        except Exception as error:  # noqa: BLE001 -- so are those of the others
            report.complain(f"{case.op}, {case.name}: torch.compile: {type(error).__name__}")
    print(f"  {case.op:<16} {case.name:<44} {row['value']:>9.2f} us", flush=True)


def run_model(report: Report, device: Any, peaks: Any) -> None:
    """The 8 B-shaped step at each size, or the toy's once."""
    import torch
    from gpu_model import DenoiseStep, StepShape, model_config, random_model

    smoke = peaks is None
    config = model_config(smoke)
    model = random_model(config, device, torch.float32 if smoke else torch.bfloat16)
    for sequences, rows in ((2, 32),) if smoke else STEPS:
        prefix = 48 if smoke else PREFIX
        row: dict[str, Any] = {
            "op": "denoise_step",
            "name": f"{sequences}x{rows} rows",
            "settings": {
                "sequences": sequences,
                "rows": rows,
                "prefix": prefix,
                "model": config.model_dump(exclude_defaults=True),
            },
        }
        if report.left_s() < 0:
            report.complain(f"denoise_step, {row['name']}: left out, {report.seconds_allowed:.0f} s are over")
            continue
        with torch.inference_mode():
            step = DenoiseStep(model, StepShape(sequences, rows, prefix))
            if not bool(step().opened.any(-1).all()):
                report.complain(f"denoise_step, {row['name']}: a sequence opened nothing")
                continue
            if not smoke:
                time_step(step, row, peaks)
        report.rows.append(row)


def time_step(step: Any, row: dict[str, Any], peaks: Any) -> None:
    """Median milliseconds of the step, launched from Python and as a graph, beside its floors."""
    import torch
    from gpu_timing import time_repeated

    row |= {"unit": "ms", "eager": round(time_repeated(step) * 1e3, 3)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    row["value"] = round(time_repeated(graph.replay) * 1e3, 3)
    weights, cached = step.num_weight_bytes(), step.num_cache_bytes()
    row |= {
        "num_bytes": weights + cached,
        "flop": step.flop(),
        "weight_read_floor": round(weights / peaks.bytes_per_s * 1e3, 3),
        "floor": round(peaks.floor_s(weights + cached, step.flop()) * 1e3, 3),
    }
    print(f"  denoise_step {row['name']}: {row['value']:.2f} ms", flush=True)


def run_engine(report: Report, device: Any, smoke: bool) -> None:
    """The engine at each number of requests, or a toy's once, where both ways must write the same tokens."""
    import torch
    from gpu_engine import Load, measure, ms_per_forward, share_of_equal_tokens, tokens_per_s
    from gpu_model import model_config, random_model

    config = model_config(smoke)
    model = random_model(config, device, torch.float32 if smoke else torch.bfloat16)
    for sequences in (3,) if smoke else SEQUENCES:
        load = Load(sequences, 65, 40, 8) if smoke else Load(sequences, PREFIX + 1, 127, 4)
        name = f"{sequences} requests"
        row: dict[str, Any] = {"op": "engine", "name": name, "settings": {"load": vars(load)}}
        row["settings"]["model"] = config.model_dump(exclude_defaults=True)
        if report.left_s() < 0:
            report.complain(f"engine, {name}: left out, {report.seconds_allowed:.0f} s are over")
            continue
        try:
            measured = measure(model, load, 1 if smoke else 3)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            report.complain(f"engine, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        static, other = measured[True], measured[False]
        row |= {
            "forwards": static.forwards,
            "static_forwards": static.static_forwards,
            "equal_tokens": round(share_of_equal_tokens(measured), 4),
        }
        if smoke and row["equal_tokens"] < 1:
            report.complain(f"engine, {name}: static steps wrote other tokens")
            continue
        if not smoke:
            row |= {"unit": "ms", "value": round(ms_per_forward(static), 3)}
            row |= {"eager": round(ms_per_forward(other), 3)}
            row |= {"tok_s": round(tokens_per_s(static), 1), "eager_tok_s": round(tokens_per_s(other), 1)}
            print(f"  engine {name}: {row['tok_s']:.0f} tok/s, {row['value']:.2f} ms a forward", flush=True)
        report.rows.append(row)


def print_table(report: Report) -> None:
    """One line a row; times in the row's unit."""
    if not any("value" in row for row in report.rows):
        print(f"{len(report.rows)} cases agree with their rivals; no times were taken")
        return
    columns = ("value", "floor", "of floor", "eager", "x", "compiled", "x")
    print(f"{'op':<17}{'case':<46}{'unit':<5}" + "".join(f"{column:>10}" for column in columns))
    for row in report.rows:
        value = row.get("value")
        if value is None:
            continue
        floor = row.get("floor")
        cells = [value, floor, None if floor is None else floor / value]
        for rival in ("eager", "compiled"):
            cells += [row.get(rival), row[rival] / value if rival in row else None]
        text = "".join(f"{'-':>10}" if cell is None else f"{cell:>10.2f}" for cell in cells)
        print(f"{row['op']:<17}{row['name']:<46}{row['unit']:<5}{text}")


if __name__ == "__main__":
    sys.exit(main())
