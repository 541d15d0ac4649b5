"""A benchmark's result for people: title, set-up, tables, targets with a tick or a cross, what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from cluster.bench.result import Result, Table, Target

MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "dim")}


def render(result: Result) -> Group:
    parts: list[RenderableType] = [Text(result.name, style="bold"), _setup(result)]
    parts += [_table(table) for table in result.tables]
    if result.targets:
        parts.append(_targets(result.targets))
    if result.limits:
        parts.append(Text("What limits it", style="bold"))
        parts += [Text(f"· {sentence}") for sentence in result.limits]
    parts.append(Text(""))
    return Group(*parts)


def _setup(result: Result) -> Text:
    """One line a fact would be a page: facts of a word side by side, the rest below."""
    words = []
    for name, value in result.setup.items():
        if isinstance(value, dict):
            value = " ".join(f"{key} {item}" for key, item in value.items())
        words.append(f"{name} {_cell(value)}")
    return Text(" · ".join(words), style="dim")


def _table(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left", title_style="bold")
    for i, column in enumerate(table.columns):
        numbers = all(isinstance(row[i], int | float | None) or _is_numeric(str(row[i])) for row in table.rows)
        made.add_column(column, justify="right" if numbers and i else "left")
    for row in table.rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def _targets(targets: Sequence[Target]) -> RichTable:
    made = RichTable(title="Targets", title_justify="left", title_style="bold")
    made.add_column("")
    made.add_column("measure")
    for column in ("target", "value"):
        made.add_column(column, justify="right")
    for target in targets:
        mark, style = MARKS[target.holds]
        made.add_row(Text(mark, style=style), _measure(target), f"{target.comparison} {target.bound:g}", _value(target))
    return made


def _measure(target: Target) -> Text:
    text = Text(target.measure)
    if target.note:
        text.append(f"\n{target.note}", style="dim")
    return text


def _value(target: Target) -> str:
    return "not measured" if target.value is None else _cell(target.value)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _is_numeric(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "-–+")
