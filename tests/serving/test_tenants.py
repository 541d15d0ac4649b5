"""API keys, tenants and the keys file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigError
from cluster.serving import tenants
from cluster.serving.tenants import (
    EVERYBODY,
    KeyRing,
    KeysFileError,
    Unauthorized,
    check_tree,
    key_hash_of,
    open_keyring,
)

SECRET = "s" * 40
ALICE, BOB, OTHER = "rk-alice", "rk-bob", "rk-other"


def tree(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"secret": SECRET, "tenants": list(entries)}


def entry(name: str, *keys: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "keys": [key_hash_of(key) for key in keys], **fields}


def write(path: Path, content: Any) -> str:
    """Every writing looks like a later one."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    write.count = getattr(write, "count", 0) + 1  # type: ignore[attr-defined]
    os.utime(path, ns=(write.count * 10**9,) * 2)  # type: ignore[attr-defined]
    return str(path)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def salt_of(name: str, secret: str = SECRET, **fields: Any) -> str:
    file = check_tree({"secret": secret, "tenants": [entry(name, **fields)]}, "keys.yaml")
    return file.tenant(file.tenants[0]).salt


# --- who --------------------------------------------------------------------------------------------------------------


def test_without_keys_everybody_is_one_administrator() -> None:
    for ring in (KeyRing.open(), open_keyring(None)):
        assert not ring.is_closed
        for header in (None, "", "Bearer anything", "nonsense"):
            assert ring.tenant_of(header) is EVERYBODY
    assert (EVERYBODY.admin, EVERYBODY.salt, EVERYBODY.max_concurrent) == (True, "", None)


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    file = tree(entry("alice", ALICE, OTHER, priority=-2, tokens_per_minute=None), entry("bob", BOB, admin=True))
    ring = open_keyring(write(tmp_path / "keys.yaml", file))
    assert ring.is_closed
    alice, bob = ring.tenant_of(f"Bearer {ALICE}"), ring.tenant_of(f"bearer   {BOB} ")
    assert (alice.name, alice.admin, alice.priority) == ("alice", False, -2)
    assert (alice.max_concurrent, alice.requests_per_minute, alice.tokens_per_minute) == (8, 600, None)
    assert (bob.name, bob.admin) == ("bob", True)
    assert ring.tenant_of(f"Bearer {OTHER}") == alice


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer \udcff", "Bearer é"]
)
def test_others_are_refused_in_words_without_their_key(tmp_path: Path, header: str | None) -> None:
    ring = KeyRing.load(write(tmp_path / "keys.yaml", tree(entry("alice", ALICE))))
    with pytest.raises(Unauthorized) as refused:
        ring.tenant_of(header)
    assert refused.value.status == 401
    assert "key" in str(refused.value)
    assert ALICE not in repr(refused.value)


def test_a_file_without_tenants_lets_nobody_in(tmp_path: Path) -> None:
    ring = KeyRing.load(write(tmp_path / "keys.yaml", {"tenants": []}))
    with pytest.raises(Unauthorized):
        ring.tenant_of(f"Bearer {ALICE}")


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.load(write(tmp_path / "keys.yaml", tree(entry("alice", ALICE, OTHER), entry("bob", BOB))))
    compared = []
    real = tenants.hmac.compare_digest
    monkeypatch.setattr(tenants.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    ring.tenant_of(f"Bearer {ALICE}")
    assert len(compared) == 3  # the first one matched, and the others were compared as well


# --- salts ------------------------------------------------------------------------------------------------------------


def test_salts_keep_tenants_apart_and_depend_on_the_secret() -> None:
    assert salt_of("alice") == salt_of("alice", priority=3)
    salts = {salt_of("alice"), salt_of("bob"), salt_of("alice", secret="t" * 40), salt_of("alice", salt="alice")}
    assert len(salts) == 4
    assert all(len(salt) == 64 for salt in salts)


def test_a_given_salt_takes_the_place_of_the_name() -> None:
    assert salt_of("alice", salt="team") == salt_of("bob", salt="team") != salt_of("team")


# --- the file ---------------------------------------------------------------------------------------------------------

GOOD = key_hash_of(ALICE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected the fields secret and tenants"),
        ([], "expected the fields secret and tenants"),
        ({}, "tenants: is missing"),
        ({"tenants": [entry("a")]}, "secret is missing"),
        ({"tenants": [], "secret": "short"}, "secret: String should have at least 32"),
        ({**tree(), "tenant": []}, "tenant: is not a field"),
        (tree({"keys": [GOOD]}), "tenants[0].name: is missing"),
        (tree(entry("a b")), "tenants[0].name: "),
        (tree(entry("x" * 65)), "tenants[0].name: "),
        (tree(entry("a"), {"name": 7}), "tenants[1].name: "),
        (tree(entry("a"), entry("a")), "tenants[1].name: tenants[0] has this name"),
        (tree(entry("a", ALICE, ALICE)), "tenants[0].keys[1]: tenant a has this key"),
        (tree(entry("a", ALICE), entry("b", ALICE)), "tenants[1].keys[0]: tenant a has this key"),
        (tree(entry("a", admn=True)), "tenants[0].admn: is not a field"),
        (tree(entry("a", admin="yes")), "tenants[0].admin: "),
        (tree(entry("a", max_concurrent=0)), "tenants[0].max_concurrent: "),
        (tree(entry("a", requests_per_minute=1.5)), "tenants[0].requests_per_minute: "),
        (tree(entry("a", tokens_per_minute=-1)), "tenants[0].tokens_per_minute: "),
        (tree(entry("a", priority=5000)), "tenants[0].priority: "),
        (tree(entry("a", salt="")), "tenants[0].salt: "),
        (tree({"name": "a", "keys": GOOD}), "tenants[0].keys: "),
        (tree({"name": "a", "keys": [GOOD, GOOD[:-1]]}), 'tenants[0].keys[1]: write "sha256:"'),
        (tree({"name": "a", "keys": [GOOD.upper()]}), 'tenants[0].keys[0]: write "sha256:"'),
        (tree({"name": "a", "keys": [GOOD + "\n"]}), 'tenants[0].keys[0]: write "sha256:"'),
        (tree({"name": "a", "keys": [ALICE]}), 'tenants[0].keys[0]: write "sha256:"'),
        (tree({"name": "a", ALICE: 1}), "tenants[0].?: is not a field"),
        ("tenants: [\n" + ALICE, "is not valid YAML near line 2"),
        ("\tsecret: " + SECRET, "is not valid YAML near line 1"),
    ],
)
def test_a_bad_file_is_refused_by_field_and_without_its_secrets(tmp_path: Path, content: Any, words: str) -> None:
    path = write(tmp_path / "keys.yaml", content)
    with pytest.raises(KeysFileError) as refused:
        KeyRing.load(path)
    message = str(refused.value)
    assert message.startswith(path)
    assert words in message
    assert not any(secret in message for secret in (SECRET, GOOD, ALICE, GOOD[7:20]))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the keys file .*: No such file"):
        KeyRing.load(str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        KeyRing.load(str(tmp_path / "binary"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(st.fixed_dictionaries({}, optional={"secret": json_like, "tenants": json_like, "x": json_like}) | json_like)
def test_whatever_the_file_has_it_is_taken_or_refused_in_words(content: Any) -> None:
    try:
        file = check_tree(content, "keys.yaml")
    except KeysFileError:
        return
    assert file.tenants == content["tenants"] == []


def test_nothing_that_is_shown_has_a_secret(tmp_path: Path) -> None:
    content = tree(entry("alice", ALICE, salt="pepper"))
    file = check_tree(content, "keys.yaml")
    ring = KeyRing.load(write(tmp_path / "keys.yaml", content))
    tenant = ring.tenant_of(f"Bearer {ALICE}")
    shown = "".join(f"{value!r} {value!s}" for value in (file, file.tenants, file.tenants[0], ring, tenant))
    assert "alice" in shown
    assert not any(secret in shown for secret in (SECRET, "pepper", GOOD, GOOD[7:20], tenant.salt))


# --- changes ----------------------------------------------------------------------------------------------------------


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys.yaml"
    ring = KeyRing.load(write(path, tree(entry("alice", ALICE))), clock)
    write(path, tree(entry("bob", BOB)))
    assert ring.tenant_of(f"Bearer {ALICE}").name == "alice"  # it was looked at just now
    clock.now = tenants.CHECK_S
    assert ring.tenant_of(f"Bearer {BOB}").name == "bob"
    with pytest.raises(Unauthorized):
        ring.tenant_of(f"Bearer {ALICE}")


@pytest.mark.parametrize("broken", ["tenants: [", None])
def test_a_broken_file_changes_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    clock, path = Clock(), tmp_path / "keys.yaml"
    ring = KeyRing.load(write(path, tree(entry("alice", ALICE))), clock)
    if broken is None:
        path.unlink()
    else:
        write(path, broken)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            clock.now += tenants.CHECK_S
            assert ring.tenant_of(f"Bearer {ALICE}").name == "alice"
    assert [record.message.startswith("the keys in use stay as they were: ") for record in caplog.records] == [True]
    write(path, tree(entry("bob", BOB)))
    clock.now += tenants.CHECK_S
    assert ring.tenant_of(f"Bearer {BOB}").name == "bob"


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    ring = KeyRing.load(write(tmp_path / "keys.yaml", tree(entry("alice", ALICE))), clock)
    monkeypatch.setattr(tenants, "read_tree", lambda path: pytest.fail("read"))
    clock.now = 100.0
    assert ring.tenant_of(f"Bearer {ALICE}").name == "alice"
