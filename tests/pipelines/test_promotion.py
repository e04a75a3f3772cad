"""The rule that says which model is served, and the alias that follows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.__main__ import main
from fewstep.kernels.model.checkpoint import embedded_model
from fewstep.pipelines.promote import promote
from fewstep.pipelines.promotion import Mark, Standing, judge, standing_of, undominated
from fewstep.pipelines.publish import publish_model
from fewstep.platform.errors import ConfigError
from fewstep.platform.mlflow_registry import alias_address
from fewstep.platform.mlflow_store import open_client, sqlite_uri
from fewstep.platform.mlflow_tracker import MlflowTracker
from fewstep.platform.records import DecodePolicy


def standing(
    *points: tuple[float, float], data: str = "held-out:1", unrefined: tuple[tuple[float, float], ...] = (),
    bar: float = 0.0,
) -> Standing:  # fmt: skip
    """From (forwards, pass@1) pairs."""

    def marks(pairs: tuple[tuple[float, float], ...]) -> tuple[Mark, ...]:
        return undominated(
            [Mark(f"p{number}", quality, cost) for number, (cost, quality) in enumerate(pairs)]
        )

    return Standing("models:/m/1", marks(points), data, 500, marks(unrefined), bar)


@pytest.mark.parametrize(
    ("candidate", "champion", "gives_up", "gains"),
    [
        (((3, 1.0),), ((15, 0.97), (40, 0.98)), (), True),
        (((3, 0.98), (40, 0.98)), ((3, 0.98), (40, 0.98)), (), False),
        (((3, 0.979),), ((15, 0.97), (40, 0.98)), ("quality",), True),
        (((20, 0.99),), ((15, 0.97), (40, 0.98)), ("speed",), True),
        (((20, 0.975),), ((15, 0.97), (40, 0.98)), ("quality", "speed"), True),
        (((50, 0.5),), ((15, 0.97), (40, 0.98)), ("quality",), False),
        (((3, 0.9), (14, 0.97), (39, 0.98)), ((15, 0.97), (40, 0.98)), (), True),
    ],
)
def test_a_candidate_gives_up_what_it_does_not_cover(
    candidate: tuple[tuple[float, float], ...],
    champion: tuple[tuple[float, float], ...],
    gives_up: tuple[str, ...],
    gains: bool,
) -> None:
    judgement = judge(standing(*candidate), standing(*champion))
    assert (judgement.gives_up, judgement.gains) == (gives_up, gains)
    assert bool(judgement.reasons) == bool(gives_up)


def test_reasons_say_what_is_lost_and_whether_it_is_noise() -> None:
    slight = judge(standing((3, 0.978)), standing((15, 0.98)))
    assert slight.reasons == (
        (
            "quality: 0.980 pass@1 at 15.00 forwards (p0) becomes at best 0.978 pass@1 at 3.00 forwards (p0); 0.002 less, "
            "within two standard errors"
        ),
    )
    grave = judge(standing((3, 0.8)), standing((15, 0.98)))
    assert "beyond two standard errors" in grave.reasons[0]
    slower = judge(standing((20, 0.99)), standing((15, 0.98)))
    assert slower.reasons == ("speed: 0.980 pass@1 at 15.00 forwards (p0) needs 20.00 forwards (p0)",)


def test_the_first_champion_is_held_to_the_model_it_was_refined_from() -> None:
    unrefined = ((15.0, 0.97), (10.0, 0.5), (40.0, 0.98))
    assert judge(standing((3, 0.97), unrefined=unrefined, bar=0.97), None).gives_up == ()
    assert judge(standing((3, 0.96), unrefined=unrefined, bar=0.97), None).gives_up == ("quality",)
    # Of 300 tasks, 152 less a hundredth are 149, but the difference lies above 149/300 by its last digit.
    bar = 152 / 300 - 0.01
    assert bar > 149 / 300
    assert judge(standing((3, 149 / 300), unrefined=((15.0, 149 / 300),), bar=bar), None).reasons == ()
    assert judge(standing((16, 149 / 300), unrefined=((15.0, 149 / 300),), bar=bar), None).gives_up == (
        "speed",
    )
    assert judge(standing((16, 0.99), unrefined=unrefined, bar=0.97), None).gives_up == ("speed",)


def test_models_measured_on_other_data_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="held-out:2"):
        judge(standing((3, 1.0), data="held-out:2"), standing((3, 1.0)))


def test_a_version_without_a_frontier_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a measured frontier"):
        standing_of("models:/m/1", {"step": 3})


def test_dominated_points_are_left_out() -> None:
    marks = [
        Mark("a", 0.5, 10),
        Mark("b", 0.4, 12),
        Mark("c", 0.9, 12),
        Mark("d", 0.9, 20),
        Mark("e", 0.5, 10),
    ]
    assert [mark.label for mark in undominated(marks)] == ["a", "c"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("store"))


def register(uri: str, name: str, *points: tuple[float, float]) -> None:
    """A version whose frontier has these (forwards, pass@1) points."""
    facts = {
        "frontier": [
            {"label": f"threshold_{number}", "pass_at_1": quality, "forwards_per_answer": cost}
            for number, (cost, quality) in enumerate(points)
        ],
        "unrefined": [{"label": "static_1", "pass_at_1": 0.98, "forwards_per_answer": 40.0}],
        "bar": 0.97, "num_tasks": 500, "data": "held-out:1",
    }  # fmt: skip
    with MlflowTracker(uri, experiment="promote", run_name="r", system_metrics=False) as tracker:
        publish_model(
            tracker, embedded_model(), name=name, alias="candidate", metrics={}, input_example="def f(",
            policy=DecodePolicy(), facts=facts,
        )  # fmt: skip


def test_the_alias_follows_the_rule_and_the_version_says_why(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register(uri, "story", (15.0, 0.975))
    assert main(["promote", "story", "--tracking-uri", uri]) == 0
    assert "models:/story@champion is now models:/story/1" in capsys.readouterr().out

    register(uri, "story", (3.0, 0.96))
    assert main(["promote", "story", "--tracking-uri", uri]) == 2
    out, err = capsys.readouterr()
    assert "models:/story/2" in out
    assert err.count("\n") == 1
    assert "gives up quality" in err
    assert "--accept quality" in err
    assert alias_address("story", "champion", uri) == "models:/story/1"
    assert main(["promote", "story", "--accept", "speed", "--tracking-uri", uri]) == 2
    capsys.readouterr()
    assert main(["promote", "story", "--accept", "quality", "--tracking-uri", uri]) == 0
    assert alias_address("story", "champion", uri) == "models:/story/2"
    version = open_client(uri, create=False).get_model_version("story", "2")
    assert "accepted: less quality" in version.tags["fewstep.promoted"]
    assert "over models:/story/1" in version.tags["fewstep.promoted"]

    register(uri, "story", (5.0, 0.5))
    assert main(["promote", "story", "--accept", "both", "--tracking-uri", uri]) == 2
    assert "nowhere better" in capsys.readouterr().err
    # Back to the first, by its number: quality is gained, speed is given up.
    assert not promote("models:/story/1", uri).promoted
    assert promote("models:/story/1", uri, "speed").promoted
    assert promote("models:/story/1", uri).promoted, "the champion stays champion"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["unheard-of"], ["models:/unheard-of@candidate", "models:/story@champion"]),
        (["story", "--candidate", "99"], ["models:/story/99", "models:/story/1"]),
        (["story", "--accept", "everything"], ["accept", "'nothing', 'quality', 'speed' or 'both'"]),
        (["story", "extra"], ["story and extra", "NAME"]),
    ],
)
def test_mistakes_are_one_line(
    uri: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if alias_or_none(uri) is None:
        register(uri, "story", (15.0, 0.975))
        promote("models:/story@candidate", uri)
    assert main(["promote", *argv, "--tracking-uri", uri]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []


def alias_or_none(uri: str) -> str | None:
    try:
        return alias_address("story", "champion", uri)
    except ConfigError:
        return None


def test_a_store_that_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address, word in (
        ("http://127.0.0.1:9", "running MLflow server"),
        (sqlite_uri(tmp_path), "existing sqlite store"),
    ):
        for command in (
            ["promote", "x"],
            ["runs"],
            ["ui", "--port", "0"],
            ["report", "x"],
            ["compare", "x", "y"],
        ):
            assert main([*command, "--tracking-uri", address]) == 2
            err = capsys.readouterr().err
            assert (err.count("\n"), word in err) == (1, True), err
