"""From options to what the laboratory understands. LabError says which option and what to do."""

from __future__ import annotations

import argparse

from policies.simulator.lab.errors import LabError
from policies.simulator.lab.naming import DEFAULT_EVICTION, Size, checked_policies, parse_size, policy_path
from policies.simulator.lab.source import Source
from policies.simulator.lab.wanted import RECORDED, Wanted
from policies.simulator.simulation import POLICY_KINDS


def source_of(options: argparse.Namespace) -> Source:
    return Source(text=options.trace, format=options.format, limit=options.limit)


def wanted_of(options: argparse.Namespace, load: str | None = None) -> Wanted:
    """Set-up and single policies; several evictions are not part of it."""
    eviction = getattr(options, "eviction", None)
    given: dict[str, str | None] = {kind: getattr(options, kind, None) for kind in POLICY_KINDS}
    given["eviction"] = eviction if isinstance(eviction, str) else None
    return Wanted(
        setup=options.setup,
        load=_load(load),
        nodes=options.nodes,
        dram=_size("--dram", options.dram),
        ssd=_size("--ssd", options.ssd),
        bucket=_size("--bucket", options.bucket),
        hardware=options.hardware,
        model=options.model,
        gpus=options.gpus,
        warm_up=options.warm_up,
        advice_s=options.advice,
        is_strict=options.strict,
        policies=checked_policies(given),
    )


def refuse_setup(options: argparse.Namespace) -> None:
    """LabError for choices that untimed runs know nothing of."""
    names = ("nodes", "dram", "ssd", "bucket", "hardware", "model", "gpus", "advice", *POLICY_KINDS[1:])
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise LabError(f"{', '.join(given)}: untimed runs have no set-up; give --load as well for timed ones")


def evictions_of(options: argparse.Namespace) -> list[str]:
    """The default policy when none is given."""
    paths = [policy_path("eviction", text) for text in options.eviction]
    return list(dict.fromkeys(paths)) or [DEFAULT_EVICTION]


def _size(what: str, text: str | None) -> Size | None:
    return None if text is None else parse_size(what, text)


def _load(text: str | None) -> float | str | None:
    if text is None or text == RECORDED:
        return text
    try:
        return float(text)
    except ValueError:
        raise LabError(f"--load is {text!r}: give a number such as 1.2, or {RECORDED}") from None
