"""`reprise keys` as an operator meets it."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.serving import keys_command
from cluster.serving.tenants import KeyRing, KeysFileError, Unauthorized, key_hash_of


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    keys_command.add_to(parser.add_subparsers(required=True))
    options = parser.parse_args(["keys", *arguments])
    options.run(options)


class Keys:
    """The command on one file, answering in JSON."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self._capsys = path, capsys

    def __call__(self, verb: str, *arguments: str) -> Any:
        run(verb, "--file", str(self.path), "--json", *arguments)
        return json.loads(self._capsys.readouterr().out)

    def tenant_of(self, key: str) -> str:
        return KeyRing.load(str(self.path)).tenant_of(f"Bearer {key}").name


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Keys:
    return Keys(tmp_path / "keys.yaml", capsys)


def test_a_new_key_opens_the_door_and_is_not_in_the_file(keys: Keys) -> None:
    made = keys("new", "--tenant", "alice")
    assert made["key"].startswith("rk-")
    assert len(made["key"]) >= 3 + 43
    assert (made["tenant"], made["admin"], made["file"]) == ("alice", False, str(keys.path))
    assert keys.tenant_of(made["key"]) == "alice"
    text = keys.path.read_text()
    assert made["key"] not in text
    assert key_hash_of(made["key"]) in text
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert os.listdir(keys.path.parent) == [keys.path.name]


def test_more_keys_and_tenants_leave_the_others_alone(keys: Keys) -> None:
    first = keys("new", "--tenant", "alice")["key"]
    secret = yaml.safe_load(keys.path.read_text())["secret"]
    second, root = keys("new", "--tenant", "alice")["key"], keys("new", "--tenant", "root", "--admin")["key"]
    assert len({first, second, root}) == 3
    assert [keys.tenant_of(key) for key in (first, second, root)] == ["alice", "alice", "root"]
    assert yaml.safe_load(keys.path.read_text())["secret"] == secret
    assert KeyRing.load(str(keys.path)).tenant_of(f"Bearer {root}").admin


def test_commands_at_the_same_time_lose_no_key(keys: Keys) -> None:
    keys("new", "--tenant", "alice")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: run("new", "--file", str(keys.path), "--tenant", "alice"), range(12)))
    assert len(yaml.safe_load(keys.path.read_text())["tenants"][0]["keys"]) == 13


def test_people_get_the_key_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    run("new", "--file", str(path), "--tenant", "alice")
    said = capsys.readouterr()
    key = said.out.strip()
    assert KeyRing.load(str(path)).tenant_of(f"Bearer {key}").name == "alice"
    assert "not shown again" in said.err
    assert key not in said.err


def test_list_shows_limits_and_ids_only(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    made = [keys("new", "--tenant", name) for name in ("alice", "alice", "bob")]
    rows = keys("list")["tenants"]
    assert [(row["tenant"], row["keys"]) for row in rows] == [
        ("alice", [made[0]["id"], made[1]["id"]]),
        ("bob", [made[2]["id"]]),
    ]
    assert (rows[0]["max_concurrent"], rows[0]["requests_per_minute"], rows[0]["tokens_per_minute"]) == (8, 600, 200000)
    run("list", "--file", str(keys.path))
    text = capsys.readouterr().out
    assert "alice" in text
    content = yaml.safe_load(keys.path.read_text())
    secrets = [content["secret"], *(known for entry in content["tenants"] for known in entry["keys"])]
    assert not any(secret in json.dumps(rows) + text for secret in secrets)


def test_revoking_one_key(keys: Keys) -> None:
    first, second = keys("new", "--tenant", "alice"), keys("new", "--tenant", "alice")
    assert keys("revoke", "--tenant", "alice", "--key", first["id"]) == {"tenant": "alice", "revoked": [first["id"]]}
    assert keys.tenant_of(second["key"]) == "alice"
    with pytest.raises(Unauthorized):
        keys.tenant_of(first["key"])


def test_revoking_all_keys_of_the_last_tenant_opens_nothing(keys: Keys) -> None:
    key = keys("new", "--tenant", "alice")["key"]
    assert len(keys("revoke", "--tenant", "alice", "--all")["revoked"]) == 1
    assert keys("list")["tenants"][0]["keys"] == []
    with pytest.raises(Unauthorized):
        keys.tenant_of(key)


def test_what_was_edited_by_hand_stays(keys: Keys) -> None:
    content = {"secret": "s" * 32, "tenants": [{"name": "alice", "tokens_per_minute": None, "salt": "team"}]}
    keys.path.write_text("# a comment\n" + yaml.safe_dump(content))
    keys.path.chmod(0o640)
    made = keys("new", "--tenant", "alice")
    found = yaml.safe_load(keys.path.read_text())
    content["tenants"][0]["keys"] = [key_hash_of(made["key"])]  # type: ignore[index]
    assert found == content
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o640
    assert "a comment" not in keys.path.read_text()
    assert "comments" in keys.path.read_text().splitlines()[0]


def test_a_link_stays_a_link(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    keys.path.symlink_to(tmp_path / "real" / "keys.yaml")
    keys("new", "--tenant", "alice")
    assert keys.path.is_symlink()
    assert (tmp_path / "real" / "keys.yaml").exists()


def test_an_empty_file_gets_a_secret_with_its_first_tenant(keys: Keys) -> None:
    keys.path.write_text("tenants: []\n")
    assert keys.tenant_of(keys("new", "--tenant", "alice")["key"]) == "alice"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("new", "--tenant", "a b"), r"tenants\[1\].name"),
        (("new", "--tenant", "alice", "--admin"), "tenant alice is there and does not administer"),
        (("revoke", "--tenant", "bob", "--all"), "there is no tenant bob"),
        (("revoke", "--tenant", "alice", "--key", "00"), "has no key with the id 00"),
    ],
)
def test_mistakes_are_told_and_change_nothing(keys: Keys, arguments: Sequence[str], words: str) -> None:
    keys("new", "--tenant", "alice")
    before = keys.path.read_text()
    with pytest.raises(KeysFileError, match=words):
        keys(*arguments)
    assert keys.path.read_text() == before
    assert os.listdir(keys.path.parent) == [keys.path.name]


@pytest.mark.parametrize("verb", [("new",), ("revoke", "--all")])
def test_a_broken_file_is_not_touched(keys: Keys, verb: Sequence[str]) -> None:
    keys.path.write_text("tenants: {}\n")
    with pytest.raises(KeysFileError, match="tenants"):
        keys(*verb, "--tenant", "alice")
    assert keys.path.read_text() == "tenants: {}\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match=r"cannot write the keys file .*: No such file"):
        run("new", "--file", str(tmp_path / "none" / "keys.yaml"), "--tenant", "alice")
    with pytest.raises(KeysFileError, match="cannot read the keys file"):
        run("list", "--file", str(tmp_path / "keys.yaml"))


def test_a_failed_write_leaves_the_old_file_and_no_other(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys("new", "--tenant", "alice")
    before = keys.path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysFileError, match="No space left"):
        keys("new", "--tenant", "bob")
    assert keys.path.read_text() == before
    assert os.listdir(keys.path.parent) == [keys.path.name]


def test_revoke_needs_to_know_which(keys: Keys) -> None:
    with pytest.raises(SystemExit):
        keys("revoke", "--tenant", "alice")
