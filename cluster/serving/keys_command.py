"""`reprise keys`: makes, lists and revokes API keys. A key is shown once; the file has its hash only.

Servers see a changed file by themselves. The file is replaced in one move and keeps its owner and mode (a new one is
for its owner only); comments in it are lost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.serving.tenants import KeysFile, KeysFileError, check_tree, key_hash_of, read_tree

HEADER = "# Written by `reprise keys`. Edit limits as you like; the next key made or revoked loses comments.\n"
ID_DIGITS = 8  # of a key's hash, by which people name it

EXAMPLES = """examples:
  reprise keys new --file keys.yaml --tenant alice
  reprise keys new --file keys.yaml --tenant root --admin
  reprise keys list --file keys.yaml
  reprise keys revoke --file keys.yaml --tenant alice --key 1f0c6a2e

The file's limits (max_concurrent, requests_per_minute, tokens_per_minute, priority) may be edited by hand. This
command keeps them; comments are lost.
"""


def add_to(commands: Any) -> None:
    """`keys` as one of the commands of an argument parser."""
    keys = _parser(commands, "keys", "Make, list and revoke API keys of a server (serving.keys_file).")
    verbs = keys.add_subparsers(required=True, metavar="VERB")
    new = _verb(
        verbs, "new", "Add a key of a tenant, and the tenant and the file if need be. Prints the key, once.", _new
    )
    new.add_argument("--tenant", required=True, help="letters, digits and . _ @ -")
    new.add_argument("--admin", action="store_true", help="the tenant is new and may administer the server")
    _verb(verbs, "list", "Show tenants, their limits and their keys' ids.", _list)
    revoke = _verb(verbs, "revoke", "Remove keys of a tenant; the tenant stays.", _revoke)
    revoke.add_argument("--tenant", required=True)
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", metavar="ID", help="the id that `new` and `list` show")
    which.add_argument("--all", action="store_true", help="all keys of the tenant")


def _parser(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return added


def _verb(verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser = _parser(verbs, name, text)
    parser.add_argument("--file", required=True, help="the keys file (YAML)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.set_defaults(run=run)
    return parser


# --- verbs ------------------------------------------------------------------------------------------------------------


def _new(options: argparse.Namespace) -> None:
    key = f"rk-{secrets.token_urlsafe(32)}"
    key_hash = key_hash_of(key)
    path = os.path.realpath(options.file)
    with _changing(path):
        tree = read_tree(path) if os.path.exists(path) else {"secret": secrets.token_urlsafe(32), "tenants": []}
        check_tree(tree, options.file)
        add_key(tree, options.tenant, key_hash, admin=options.admin)
        file = check_tree(tree, options.file)
        _write(path, tree)
    if options.json:
        is_admin = next(entry.admin for entry in file.tenants if entry.name == options.tenant)
        facts = {"tenant": options.tenant, "admin": is_admin, "id": key_id(key_hash), "key": key, "file": options.file}
        print(json.dumps(facts))
    else:
        print(key)
        words = f"key {key_id(key_hash)} of tenant {options.tenant} is in {options.file}; it is not shown again"
        print(words, file=sys.stderr)


def _list(options: argparse.Namespace) -> None:
    rows = describe(check_tree(read_tree(options.file), options.file))
    if options.json:
        print(json.dumps({"tenants": rows}, indent=2))
        return
    table = Table(*(name.replace("_", " ") for name in rows[0])) if rows else Table("no tenants")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _revoke(options: argparse.Namespace) -> None:
    path = os.path.realpath(options.file)
    with _changing(path):
        tree = read_tree(path)
        check_tree(tree, options.file)
        removed = remove_keys(tree, options.tenant, None if options.all else options.key)
        _write(path, tree)
    if options.json:
        print(json.dumps({"tenant": options.tenant, "revoked": removed}))
    else:
        print(f"revoked of tenant {options.tenant}: {', '.join(removed) or 'nothing, it has no keys'}")


# --- the file's content -----------------------------------------------------------------------------------------------


def add_key(tree: dict[str, Any], tenant: str, key_hash: str, *, admin: bool) -> None:
    """Changes a checked file's content. Raises KeysFileError."""
    entry = _entry(tree, tenant)
    if entry is None:
        entry = {"name": tenant, "keys": [], "admin": admin}
        tree["tenants"].append(entry)
    elif admin and not entry.get("admin", False):
        raise KeysFileError(
            f"tenant {tenant} is there and does not administer; its other keys would as well: choose another name, "
            f"or set its admin field in the file"
        )
    if tree.get("secret") is None:
        tree["secret"] = secrets.token_urlsafe(32)
    entry["keys"] = [*entry.get("keys", []), key_hash]


def remove_keys(tree: dict[str, Any], tenant: str, wanted_id: str | None) -> list[str]:
    """Changes a checked file's content; None removes all keys. The ids removed. Raises KeysFileError."""
    entry = _entry(tree, tenant)
    if entry is None:
        raise KeysFileError(f"there is no tenant {tenant}: see `reprise keys list`")
    going = [known for known in entry.get("keys", []) if wanted_id in (None, key_id(known))]
    if wanted_id is not None and not going:
        raise KeysFileError(f"tenant {tenant} has no key with the id {wanted_id}: see `reprise keys list`")
    entry["keys"] = [known for known in entry.get("keys", []) if known not in going]
    return [key_id(known) for known in going]


def describe(file: KeysFile) -> list[dict[str, Any]]:
    """What may be shown of it."""
    return [
        {
            "tenant": entry.name,
            "admin": entry.admin,
            "priority": entry.priority,
            "max_concurrent": entry.max_concurrent,
            "requests_per_minute": entry.requests_per_minute,
            "tokens_per_minute": entry.tokens_per_minute,
            "keys": [key_id(known) for known in entry.keys],
        }
        for entry in file.tenants
    ]


def key_id(key_hash: str) -> str:
    """The first digits of its hash: enough to find it in the file, useless for anything else."""
    return key_hash.removeprefix("sha256:")[:ID_DIGITS]


def _entry(tree: dict[str, Any], tenant: str) -> dict[str, Any] | None:
    return next((entry for entry in tree["tenants"] if entry["name"] == tenant), None)


def _cell(value: Any) -> str:
    if value is None:
        return "no limit"
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _changing(path: str) -> Iterator[None]:
    """One command at a time changes files of this folder. Raises KeysFileError where one cannot write."""
    folder = None
    try:
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    except OSError as error:
        raise KeysFileError(f"cannot write the keys file {path}: {error.strerror}") from None
    finally:
        if folder is not None:
            os.close(folder)


def _write(path: str, tree: dict[str, Any]) -> None:
    """All of it or nothing, also when the machine fails."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".keys-")  # for its owner only
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(HEADER + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
            file.flush()
            if os.path.exists(path):
                _resemble(file.fileno(), os.stat(path))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _resemble(handle: int, old: os.stat_result) -> None:
    """The server that could read the old file can read the new one."""
    new = os.fstat(handle)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))
