"""Classes named in a configuration: "module:Class", "folder/file.py:Class", "module:Class(option=value, ...)".

A module is anything that can be imported. A file is looked for in the working directory, then along the import path. It
is executed once under a name made of its own and its content: the same on every machine, another one once it is edited.
Everything that is wrong is a ValueError with advice, whatever foreign code may raise.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType

HOW = 'write "module:Class", "folder/file.py:Class" or "module:Class(option=value)"'


@dataclass(frozen=True, slots=True)
class ImportPath:
    """A class and what it is to be made with."""

    source: str  # a module, or a file that ends in .py
    name: str
    options: Mapping[str, object]


def make(text: str) -> object:
    """The object that `text` stands for; ValueError says what is wrong with it."""
    path = parse(text)
    factory = _find_class(path)
    try:
        signature = inspect.signature(factory)
        signature.bind(**path.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be made like this ({error}); {_accepted(factory)}") from None
    try:
        made: object = factory(**path.options)
    except Exception as error:  # foreign code
        raise ValueError(f"{path.name} cannot be made like this ({describe(error)}); {_accepted(factory)}") from error
    return made


def parse(text: str) -> ImportPath:
    """Takes "source:Class" or "source:Class(option=value)" apart; values are literals."""
    file, is_file, rest = text.partition(".py:")
    source, rest = (f"{file}.py", rest) if is_file else text.partition(":")[::2]
    if not source or not rest:
        raise ValueError(HOW)
    try:
        tree = ast.parse(rest.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{rest!r} is not the name of a class ({error.msg}); {HOW}") from None
    if isinstance(tree, ast.Name):
        return ImportPath(source, tree.id, {})
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        raise ValueError(f"{rest!r} is not the name of a class; {HOW}")  # noqa: TRY004 - of its text
    if tree.args or any(keyword.arg is None for keyword in tree.keywords):
        raise ValueError(f"the options of {rest!r} have no names; {HOW}")
    return ImportPath(source, tree.func.id, {str(word.arg): _literal(word) for word in tree.keywords})


def _literal(keyword: ast.keyword) -> object:
    try:
        value: object = ast.literal_eval(keyword.value)
    except ValueError:
        option = f"{keyword.arg}={ast.unparse(keyword.value)}"
        raise ValueError(f"option {option} must be a plain value, such as 3, 0.5, 'text' or True") from None
    return value


def _find_class(path: ImportPath) -> type:
    module = _run_file(path.source) if path.source.endswith(".py") else _import(path.source)
    factory = getattr(module, path.name, None)
    if not isinstance(factory, type):
        own = [value for value in vars(module).values() if isinstance(value, type) and _is_from(value, module)]
        known = ", ".join(sorted({value.__name__ for value in own}))
        raise ValueError(f"{path.source!r} has no class {path.name!r}, it has: {known}")  # noqa: TRY004 - of its text
    return factory


def _is_from(value: type, module: ModuleType) -> bool:
    """Made there or, for a package, in one of its modules; a contract is no choice."""
    return f"{value.__module__}.".startswith(f"{module.__name__}.") and not getattr(value, "_is_protocol", False)


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except Exception as error:  # foreign code
        raise ValueError(f"module {name!r} cannot be imported here ({describe(error)})") from error


def _run_file(source: str) -> ModuleType:
    file = _find_file(source)
    digest = sha256(file.read_bytes()).hexdigest()
    name = f"policy_file_{file.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "and here it is"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # foreign code
        del sys.modules[name]
        raise ValueError(f"file {source!r} cannot be imported ({describe(error)})") from error
    return module


def _find_file(source: str) -> Path:
    wanted = Path(source).expanduser()
    for folder in ("", *sys.path):
        file = Path(folder) / wanted
        if file.is_file():
            return file.resolve()
    where = "" if wanted.is_absolute() else f" in {Path.cwd()} or along the import path; try an absolute path"
    raise ValueError(f"there is no file {source!r}{where}")


def _accepted(factory: type) -> str:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return "it accepts nothing that can be named"
    words = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return f"it accepts: {', '.join(words)}" if words else "it accepts no options"


def describe(error: BaseException) -> str:
    """What was raised and, where that says more, in which file and line."""
    words = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return f"{words} at {error.filename}:{error.lineno}"
    if isinstance(error, ModuleNotFoundError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return f"{words} at {frames[-1].filename}:{frames[-1].lineno}" if frames else words
