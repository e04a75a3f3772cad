"""One file, dotted overrides, one frozen object; every mistake is one line that names the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from fewstep.platform.config import Config, config_keys, load_config, render_config
from fewstep.platform.errors import ConfigError
from fewstep.platform.records import DecodePolicy


class Optimizer(Config):
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)


class Job(Config):
    steps: int = 10
    """Optimizer steps."""
    kind: Literal["mask", "edit"] = "mask"
    out: Path | None = None
    optimizer: Optimizer = Optimizer()
    policies: tuple[DecodePolicy, ...] = (DecodePolicy(),)

    @model_validator(mode="after")
    def _even(self) -> Job:
        if self.steps % 2:
            raise ValueError("steps must be even")
        return self


class Needy(Config):
    model: str


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 20\noptimizer:\n  learning_rate: 3e-4\n")
    job = load_config(Job, path, ["steps=40", "optimizer.betas=[0.8, 0.9]", "steps=60"])
    assert job.steps == 60
    assert job.optimizer == Optimizer(learning_rate=3e-4, betas=(0.8, 0.9))


def test_no_file_and_an_empty_file_mean_defaults(tmp_path: Path) -> None:
    assert load_config(Job, None, []) == Job() == load_config(Job, write(tmp_path, ""), [])


def test_override_values_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "out: somewhere\npolicies:\n- {kind: static}\n- {threshold: 0.5}\n")
    job = load_config(Job, path, ["out=null", "optimizer.learning_rate=5e-5", "policies.1.threshold=0.7"])
    assert job.out is None
    assert job.optimizer.learning_rate == 5e-5
    assert [policy.threshold for policy in job.policies] == [0.9, 0.7]
    assert load_config(Job, None, ["out=a=b"]).out == Path("a=b")


class Tuned(Config):
    optimizer: Optimizer = Optimizer(learning_rate=0.5)
    weights: tuple[float, ...] = (1.0, 2.0)


def test_a_section_given_in_part_keeps_the_jobs_own_defaults(tmp_path: Path) -> None:
    expected = Tuned(optimizer=Optimizer(learning_rate=0.5, betas=(0.1, 0.2)), weights=(1.0, 3.0))
    assert load_config(Tuned, None, ["optimizer.betas=[0.1, 0.2]", "weights.1=3"]) == expected
    path = write(tmp_path, "optimizer:\n  betas: [0.1, 0.2]\nweights: [1, 3]\n")
    assert load_config(Tuned, path, []) == expected


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Job().steps = 4  # type: ignore[misc]


def test_render_loads_back_equal(tmp_path: Path) -> None:
    job = load_config(Job, None, ["out=runs/ü", "optimizer.learning_rate=1e-7", "policies=[{kind: static}]"])
    assert load_config(Job, write(tmp_path, render_config(job)), []) == job


def test_keys_carry_type_default_and_documentation() -> None:
    keys = {key.path: key for key in config_keys(Job)}
    assert list(keys)[:4] == ["steps", "kind", "out", "optimizer.learning_rate"]
    assert keys["steps"].description == "Optimizer steps."
    assert (keys["kind"].type, keys["kind"].default) == ("mask | edit", "'mask'")
    assert keys["optimizer.betas"].default == "(0.9, 0.95)"
    assert config_keys(Needy)[0].default == "required"


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["step=4"], "step", ["unknown key", "did you mean steps?"]),
        (["optimizer.learning_rat=1"], "optimizer.learning_rat", ["did you mean optimizer.learning_rate?"]),
        (["betas=[1, 2]"], "betas", ["did you mean optimizer.betas?"]),
        (["policies=[{tresholt: 1}]"], "policies.0.tresholt", ["did you mean policies.0.threshold?"]),
        (["zzzzzz=1"], "zzzzzz", ["steps", "remove the key"]),
        (["steps=many"], "steps", ["'many'", "valid integer"]),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate", ["0", "greater than 0"]),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate", ["nan", "finite"]),
        (["kind=masks"], "kind", ["'mask' or 'edit'"]),
        (["steps=3"], "Job", ["steps must be even"]),
        (["steps=x", "kind=y"], "steps", ["1 more problem"]),
        (["steps.deep=3"], "steps", ["valid integer"]),
        (["optimizer=5", "optimizer.betas=1"], "optimizer.betas", ["has no keys of its own"]),
        (["policies=[{}]", "policies.3.seed=1"], "policies.3.seed", ["index from 0 to 0"]),
        (["steps"], "override", ["key=value"]),
        (["=3"], "override", ["key=value"]),
        (["steps=[1"], "steps", ["valid YAML"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else value,
)
def test_mistakes_name_the_key_and_the_way_out(overrides: list[str], field: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Job, None, overrides)
    message = str(caught.value)
    assert caught.value.field == field
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 2\nsteps: 4\n", ["'steps' appears twice", "line 2"]),
        ("- 1\n- 2\n", ["list", "mapping"]),
        ("steps: [1\n", ["valid YAML", "line 2"]),
        ("? [1, 2]\n: 3\n", ["unhashable key", "line 1"]),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Job, write(tmp_path, text), [])
    for word in words:
        assert word in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(Job, tmp_path / "nowhere.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Job, tmp_path / "binary.yaml", [])


def test_missing_key_yields_to_the_misspelling_that_caused_it() -> None:
    with pytest.raises(ConfigError, match="the key is required"):
        load_config(Needy, None, [])
    with pytest.raises(ConfigError, match="did you mean model"):
        load_config(Needy, None, ["modl=x"])
