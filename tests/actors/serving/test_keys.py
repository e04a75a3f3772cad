"""The file of keys: what it holds, whom it lets in, and how it follows changes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fewstep.actors.serving import keys
from fewstep.actors.serving.keys import KeyRing, make_key, read_keys, write_keys
from fewstep.cluster.keys import KeyConfig, run
from fewstep.platform.errors import ConfigError


def test_a_key_is_known_and_any_other_is_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    (key, entry), (other, _) = make_key("ann"), make_key("bob")
    write_keys(path, [entry])
    ring = KeyRing(path)
    assert ring.find(key) == entry
    wrong = [
        other,
        key[:-1],
        key + "x",
        "",
        "fs",
        f"xx{key[2:]}",
        f"fs-{entry.id}-",
        f"fs-{entry.id}-{entry.sha256}",
    ]
    assert [ring.find(text) for text in wrong] == [None] * len(wrong)


def test_the_file_holds_no_key_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, entry = make_key("ann")
    write_keys(path, [entry])
    assert key.rpartition("-")[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert make_key("ann")[1].sha256 != entry.sha256


def test_a_changed_file_is_followed_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_RELOAD_S", 0.0)
    path = tmp_path / "keys.json"
    (first, one), (second, two) = make_key("ann"), make_key("bob")
    write_keys(path, [one])
    ring = KeyRing(path)
    assert ring.find(second) is None
    write_keys(path, [two])
    os.utime(path, ns=(1, 1))
    assert (ring.find(first), ring.find(second)) == (None, two)
    path.write_text("{broken")
    os.utime(path, ns=(2, 2))
    assert ring.find(second) == two


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "a file of keys"),
        ('{"keys": [{"name": "a"}]}', "keys.0.id"),
        ('{"keys": [], "more": 1}', "more"),
        ("[]", "a file of keys"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_keys(path)


def test_the_command_adds_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    run(KeyConfig(name="ann", file=path))
    run(KeyConfig(name="bob", file=path, weight=2.0))
    ann, bob = capsys.readouterr().out.split()
    ring = KeyRing(path)
    found = ring.find(bob)
    assert found is not None
    assert (found.name, found.weight) == ("bob", 2.0)
    with pytest.raises(ConfigError, match="a name without a key"):
        run(KeyConfig(name="ann", file=path))
    run(KeyConfig(name="ann", file=path, remove=True))
    assert KeyRing(path).find(ann) is None
    with pytest.raises(ConfigError, match="got 'ann'; allowed: bob"):
        run(KeyConfig(name="ann", file=path, remove=True))
    with pytest.raises(ConfigError, match="fewstep key NAME"):
        run(KeyConfig(file=path))
