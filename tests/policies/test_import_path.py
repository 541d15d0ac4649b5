"""Import paths: modules, files from any working directory, options, and errors that say what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from policies import messages as m
from policies.eviction import Lru
from policies.import_path import make, parse
from policies.plugins import load_policy
from policies.scheduler import Scheduler

MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from policies.eviction import Lru

@dataclass(frozen=True, slots=True)
class Weights:
    """Dataclasses look for their module by its name."""
    now: float = 1.0

class Mine(Lru):
    def __init__(self, size: int = 3, *, name: str = "mine") -> None:
        super().__init__()
        self.size, self.name, self.weights = size, name, Weights()
        if size < 0:
            raise ValueError("size must not be negative")
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "own" / "mine.py"
    file.parent.mkdir()
    file.write_text(MINE)
    return file


@pytest.mark.parametrize(
    ("text", "source", "name", "options"),
    [
        ("policies.eviction:Lru", "policies.eviction", "Lru", {}),
        ("a.b:C()", "a.b", "C", {}),
        (
            "a:C(x=1, y=-0.5, z='a:b', on=True, no=None)",
            "a",
            "C",
            {"x": 1, "y": -0.5, "z": "a:b", "on": True, "no": None},
        ),
        ("a:C(shares={'dram': [1, 2]})", "a", "C", {"shares": {"dram": [1, 2]}}),
        ("/x/y.py:C(x=1)", "/x/y.py", "C", {"x": 1}),
        ("y.py:C(name='z.py:D')", "y.py", "C", {"name": "z.py:D"}),
    ],
)
def test_the_parts_of_a_path(text: str, source: str, name: str, options: dict[str, object]) -> None:
    path = parse(text)
    assert (path.source, path.name, dict(path.options)) == (source, name, options)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Lru", 'write "module:Class", "folder/file.py:Class" or "module:Class'),
        ("policies.eviction:Lru(3)", "the options of 'Lru\\(3\\)' have no names; write"),
        ("policies.eviction:Lru(**{'a': 1})", "have no names; write"),
        ("policies.eviction:Lru(a=b)", "option a=b must be a plain value"),
        ("policies.eviction:Lru(a=open('x'))", r"option a=open\('x'\) must be a plain value"),
        ("policies.eviction:Lru(", "is not the name of a class"),
        ("policies.eviction:Lru.victims", "is not the name of a class"),
        ("policies.eviction:Lru(a=1)", "unexpected keyword argument 'a'.*it accepts no options"),
        ("policies.nowhere:Lru", r"module 'policies.nowhere' cannot be imported here \(No module named"),
        ("nowhere.py:Lru", "there is no file 'nowhere.py' in .* or along the import path; try an absolute path"),
        ("/nowhere.py:Lru", "there is no file '/nowhere.py'$"),
    ],
)
def test_a_bad_path_says_what_to_do(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        make(text)
    with pytest.raises(ValueError, match=r"eviction policy .*" + advice):
        Scheduler(m.SchedulerConfig(eviction=text))


def test_a_file_with_options(mine: Path) -> None:
    policy = load_policy("eviction", f"{mine}:Mine(size=5, name='other')")
    assert isinstance(policy, Lru)
    assert (policy.size, policy.name) == (5, "other")  # type: ignore[attr-defined]
    Scheduler(m.SchedulerConfig(eviction=f"{mine}:Mine"))


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        ("Mine(sise=3)", "unexpected keyword argument 'sise'.*; it accepts: size=3, name='mine'"),
        ("Mine(size=-1)", r"ValueError: size must not be negative at .*mine.py:\d+\); it accepts: size=3"),
        ("Mine(size='big')", r"TypeError: .*mine.py:\d+\); it accepts: size=3"),
        ("Yours", "has no class 'Yours', it has: Mine, Weights"),
    ],
)
def test_a_bad_option_names_the_accepted_ones(mine: Path, call: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        load_policy("eviction", f"{mine}:{call}")


def test_a_file_is_found_from_where_one_stands(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent.parent)
    assert type(make("own/mine.py:Mine")) is type(make(f"{mine}:Mine")), "one file, one class"
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="there is no file"):
        make("own/mine.py:Mine")
    monkeypatch.syspath_prepend(str(mine.parent.parent))
    assert type(make("own/mine.py:Mine")) is type(make(f"{mine}:Mine"))


def test_a_file_has_the_same_name_everywhere_until_it_is_edited(mine: Path) -> None:
    elsewhere = mine.parent / "elsewhere" / "mine.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(MINE)
    before, same = type(make(f"{mine}:Mine")), type(make(f"{elsewhere}:Mine"))
    assert before.__module__ == same.__module__
    mine.write_text(MINE.replace("size: int = 3", "size: int = 4"))
    after = make(f"{mine}:Mine")
    assert type(after).__module__ != before.__module__
    assert after.size == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("x = 1\nraise OSError('no')\n", r"OSError: no at .*broken.py:2"),
        ("x = (\n", r"SyntaxError: .* at .*broken.py:1"),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_its_line(tmp_path: Path, code: str, problem: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(code)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=rf"file '.*broken.py' cannot be imported \({problem}"):
        make(f"{file}:Mine")
    assert not [name for name in set(sys.modules) - before if "broken" in name]
