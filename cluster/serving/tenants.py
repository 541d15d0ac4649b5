"""Whose request it is: API keys and their tenants, from a keys file that knows hashes and no key.

    secret: <random; `reprise keys new` makes it>
    tenants:
      - name: alice
        keys: ["sha256:<hex>"]      # of keys with 256 random bits: nothing slower than SHA-256 is needed
        admin: false
        priority: 0
        max_concurrent: 8
        requests_per_minute: 600
        tokens_per_minute: 200000   # null: no limit

A tenant's salt is HMAC(secret, its name): neither who knows the name nor who reads chunk keys in a bucket can tell
which prompts a tenant has stored. A `salt` in the file takes the name's place in it: tenants with equal salts share
their KV and conversations, and a tenant that is renamed keeps them. With another `secret` nothing stored is found.

The file is read again when it has changed. What is shown of the values here, in logs and in errors, has no secret.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from cluster.config import ConfigError
from cluster.serving.errors import ApiError

log = logging.getLogger(__name__)

CHECK_S = 2.0
"""How often the file is looked at."""

_STRICT = ConfigDict(extra="forbid")
_SALT_TAG = b"reprise/tenant/1\0"

Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
KeyHash = Annotated[StrictStr, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Limit = Annotated[StrictInt, Field(gt=0)] | None


class KeysFileError(ConfigError):
    """The keys file cannot be used; the message names the file and the field, never a value."""


class Unauthorized(ApiError):  # noqa: N818 - named like the status
    """No tenant has this key."""

    def __init__(self, message: str) -> None:
        super().__init__(401, message, code="invalid_api_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who asks. A limit that is None does not exist."""

    name: str
    admin: bool = False
    priority: int = 0
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    salt: str = field(default="", repr=False)


EVERYBODY = Tenant(name="", admin=True)
"""Who asks where there are no keys."""


@dataclass(frozen=True, kw_only=True)
class TenantEntry:
    """A tenant in the keys file."""

    __pydantic_config__ = _STRICT

    name: Name
    keys: list[KeyHash] = field(default_factory=list, repr=False)
    admin: StrictBool = False
    priority: Annotated[StrictInt, Field(ge=-1000, le=1000)] = 0
    """Lower is more urgent."""
    max_concurrent: Limit = 8
    requests_per_minute: Limit = 600
    tokens_per_minute: Limit = 200_000
    salt: Annotated[StrictStr, Field(min_length=1)] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class KeysFile:
    """The file, checked."""

    __pydantic_config__ = _STRICT

    tenants: list[TenantEntry]
    secret: Annotated[StrictStr, Field(min_length=32)] | None = field(default=None, repr=False)

    def tenant(self, entry: TenantEntry) -> Tenant:
        salted = _SALT_TAG + (b"salt\0" + entry.salt.encode() if entry.salt else b"name\0" + entry.name.encode())
        return Tenant(
            name=entry.name,
            admin=entry.admin,
            priority=entry.priority,
            max_concurrent=entry.max_concurrent,
            requests_per_minute=entry.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute,
            salt=hmac.digest((self.secret or "").encode(), salted, "sha256").hex(),
        )


# --- the file ---------------------------------------------------------------------------------------------------------


def read_tree(path: str) -> Any:
    """The file's YAML. Raises KeysFileError."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysFileError(f"cannot read the keys file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeysFileError(f"{path} is not valid YAML: it is not UTF-8") from None
    except yaml.YAMLError as error:  # its words quote the file
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}" if mark is not None else ""
        raise KeysFileError(f"{path} is not valid YAML{where}") from None


def check_tree(tree: Any, path: str) -> KeysFile:
    """The file's content, checked. Raises KeysFileError naming the first bad field."""
    if not isinstance(tree, dict):
        raise KeysFileError(f"{path}: expected the fields secret and tenants; `reprise keys new` makes such a file")
    try:
        file: KeysFile = TypeAdapter(KeysFile).validate_python(tree)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise KeysFileError(f"{path}: {_field(problem['loc'])}: {_words(problem)}") from None
    if file.tenants and file.secret is None:
        raise KeysFileError(f"{path}: secret is missing: write 32 or more random characters")
    _check_unique(file, path)
    return file


def _check_unique(file: KeysFile, path: str) -> None:
    names: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for i, entry in enumerate(file.tenants):
        if names.setdefault(entry.name, i) != i:
            raise KeysFileError(f"{path}: tenants[{i}].name: tenants[{names[entry.name]}] has this name already")
        for j, key_hash in enumerate(entry.keys):
            if key_hash in hashes:
                raise KeysFileError(f"{path}: tenants[{i}].keys[{j}]: tenant {hashes[key_hash]} has this key already")
            hashes[key_hash] = entry.name


def _field(loc: tuple[int | str, ...]) -> str:
    """A name that is none, perhaps a key in the wrong place, is not shown."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part if part.isidentifier() else '?'}" for part in loc]
    return "".join(parts).removeprefix(".")


def _words(problem: Any) -> str:
    match problem["type"], problem["loc"]:
        case "unexpected_keyword_argument", _:
            return "is not a field"
        case "missing" | "missing_argument", _:
            return "is missing"
        case "string_pattern_mismatch", (*_, "keys", _):
            return 'write "sha256:" and the 64 hex digits of the key\'s hash (`reprise keys new`), never the key'
    return str(problem["msg"])


# --- the ring ---------------------------------------------------------------------------------------------------------


def key_hash_of(key: str) -> str:
    """As it stands in the file."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


class KeyRing:
    """Tells tenants by their keys. Made by `load` or `open`; one event loop uses it."""

    def __init__(self, path: str | None, clock: Callable[[], float]) -> None:
        """`path` is None: no keys, everybody is the same administrator."""
        self._path, self._clock = path, clock
        self._holders: list[tuple[str, Tenant]] = []
        self._stamp: tuple[int, ...] | None = None
        self._next_look = clock() + CHECK_S
        if path is not None:
            self._stamp = _stamp(path)
            self._holders = list(_holders(path))

    @classmethod
    def load(cls, path: str, clock: Callable[[], float] = time.monotonic) -> KeyRing:
        """Raises KeysFileError."""
        return cls(path, clock)

    @classmethod
    def open(cls) -> KeyRing:
        return cls(None, time.monotonic)

    def __repr__(self) -> str:
        return f"KeyRing({self._path!r}, {len(self._holders)} keys)"

    @property
    def is_closed(self) -> bool:
        """Whether a key is needed."""
        return self._path is not None

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Who sends this header (`Bearer <key>`). Raises Unauthorized.

        The key's hash is compared with every hash there is, each in constant time: how long it takes tells nothing.
        """
        if self._path is None:
            return EVERYBODY
        self._look(self._path)
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is needed: send the header `Authorization: Bearer <key>`")
        asked = key_hash_of(key.strip()).encode()
        found = [tenant for known, tenant in self._holders if hmac.compare_digest(known.encode(), asked)]
        if not found:
            raise Unauthorized("this API key is not known: it may have been revoked, ask the server's administrator")
        return found[0]

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name, if it has a key."""
        return next((tenant for _, tenant in self._holders if tenant.name == name), None)

    def _look(self, path: str) -> None:
        """Reads the file again if it has changed; one that cannot be used changes nothing."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + CHECK_S
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._holders = list(_holders(path))
            log.info("the keys file %s has changed: %d keys", path, len(self._holders))
        except KeysFileError as error:
            log.error("the keys in use stay as they were: %s", error)


def open_keyring(keys_file: str | None) -> KeyRing:
    """Of the configured file; without one, everybody may ask. Raises KeysFileError."""
    return KeyRing.load(keys_file) if keys_file is not None else KeyRing.open()


def _holders(path: str) -> Iterator[tuple[str, Tenant]]:
    file = check_tree(read_tree(path), path)
    for entry in file.tenants:
        tenant = file.tenant(entry)
        yield from ((key_hash, tenant) for key_hash in entry.keys)


def _stamp(path: str) -> tuple[int, ...] | None:
    """Another one: the file has changed. None: it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
