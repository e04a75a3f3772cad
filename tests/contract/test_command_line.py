"""The command line as a stranger meets it: quick help, one-line errors, honest exit codes."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fewstep.__main__ import main
from fewstep.cluster.commands import COMMANDS, Command
from fewstep.platform.config import Config, config_keys
from fewstep.platform.errors import CheckpointError

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "matplotlib", "pandas", "fastapi")
# Prints which heavy libraries a command line brought in, whatever the way it ended.
PROBE = f"""
import sys
from fewstep.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def loaded_by(*argv: str) -> tuple[list[str], str, float]:
    """(heavy libraries loaded, what was printed, CPU seconds) of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, not wall time: what the command costs does not depend on who else uses the machine.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text, _, names = done.stdout.rpartition("LOADED")
    return names.split(), text, seconds


@pytest.mark.parametrize(
    "argv", [[], *([name] for name in COMMANDS)], ids=lambda argv: " ".join(argv) or "fewstep"
)
def test_help_is_instant_and_lists_what_there_is(argv: list[str]) -> None:
    heavy, text, seconds = loaded_by(*argv, "--help")
    assert heavy == []
    assert seconds < 1.0
    wanted = (
        ["--" + key.path.replace("_", "-") for key in config_keys(COMMANDS[argv[0]].config_class())]
        if argv
        else COMMANDS
    )
    assert [word for word in wanted if word not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_configuration_and_a_function(name: str) -> None:
    assert issubclass(COMMANDS[name].config_class(), Config)
    module, _, attribute = COMMANDS[name].run.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_dry_run_loads_nothing_heavy_and_prints_yaml() -> None:
    heavy, text, _ = loaded_by(
        "generate", "--dry-run", "policy.threshold=0.5", "--prompt", "a: [b", "--max-tokens", "8"
    )
    assert heavy == []
    shown = yaml.safe_load(text)
    assert (shown["policy"]["threshold"], shown["prompt"], shown["max_tokens"]) == (0.5, "a: [b", 8)


@pytest.mark.parametrize(
    ("options", "model"),
    [(["--model", "a: [b"], "a: [b"), (["--model", "a", "--model", "models:/b@c"], ["a", "models:/b@c"])],
)
def test_an_option_that_takes_one_or_several_may_be_repeated(
    capsys: pytest.CaptureFixture[str], options: list[str], model: str | list[str]
) -> None:
    assert main(["serve", *options, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"] == model


def test_options_win_over_overrides_and_those_over_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text("max_tokens: 1\nprompt: from file\n")
    assert main(["generate", "max_tokens=2", str(path), "--max-tokens", "3", "show=steps", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["max_tokens"], shown["prompt"], shown["show"]) == (3, "from file", "steps")
    odd = tmp_path / "a=b.yaml"
    path.rename(odd)
    assert main(["generate", "--config", str(odd), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["prompt"] == "from file"


def test_a_key_of_two_values_takes_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--compare", "models:/a@b", "runs/x: y", "out=runs/z", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["compare"], shown["out"]) == (["models:/a@b", "runs/x: y"], "runs/z")


def test_a_switch_takes_no_value_and_has_an_opposite(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["pretrain", "--no-resume", "steps=3", "--no-complementary", "--complementary", "--dry-run"])
        == 0
    )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["resume"], shown["complementary"], shown["steps"]) == (False, True, 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", "max_token=3"], ["max_token:", "unknown key", "did you mean max_tokens?"]),
        (["generate", "policy.treshold=3"], ["policy.treshold", "did you mean policy.threshold?"]),
        (["generate", "--max-token", "3"], ["--max-token:", "did you mean --max-tokens?"]),
        (["pretrain", "--ray-adress", "x:1"], ["--ray-adress:", "did you mean --ray-address?"]),
        (["pretrain", "--ray-cpus", "many"], ["--ray-cpus", "'many'"]),
        (["generate", "policy.threshold=2"], ["policy.threshold", "got 2", "less than or equal to 1"]),
        (["generate", "--max-tokens"], ["--max-tokens", "expected one argument"]),
        (["generate", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["generate", "a.yaml", "b.yaml"], ["a.yaml and b.yaml", "one configuration file"]),
        (["evaluate", "--compare", "one"], ["--compare", "expected 2 arguments"]),
        (["evaluate", "benchmarks=humanevl"], ["benchmarks.0.name", "humaneval"]),
        (["evaluate", "num_samples=3"], ["temperature 0 has one answer a task"]),
        (["generat"], ["'generat'", "did you mean generate?"]),
        (["generate", "--model", "nowhere", "--prompt", "x"], ["nowhere", "check the path"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fewstep: error: ")
    for word in words:
        assert word in err


def test_the_installed_command_agrees() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "generate", "x=1"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_reader_that_leaves_is_no_traceback() -> None:
    # The pipe has no reader from the start, so the first flush fails.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "fewstep", "generate", "--dry-run"]
        done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def refuse(config: Config) -> None:
    """A job whose actor refuses its input."""
    import ray

    def actor() -> None:
        raise CheckpointError("model", "half a file", "a whole one", "copy it again")

    ray.get(ray.remote(actor).remote())


@pytest.mark.ray
def test_a_mistake_found_in_an_actor_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("refuses", COMMANDS["generate"].config, f"{__name__}:refuse", ray=True)
    monkeypatch.setitem(COMMANDS, "refuse", command)
    assert main(["refuse", "--ray-cpus", "1"]) == 2
    message = "fewstep: error: model: got half a file; allowed: a whole one; fix: copy it again\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_their_code(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "fewstep", "generate"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            # More than a pipe holds: when the write returns, the command is inside its job, reading the prompt.
            process.stdin.write(b"x" * 2**20)
            assert signalled_until_it_ends(process, number) == code
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


def signalled_until_it_ends(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    # A signal between two reads is noticed at the end of the second one only, so it is sent again, as a user would.
    for _ in range(60):
        process.send_signal(number)
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"still running after 60 times {number.name}")
