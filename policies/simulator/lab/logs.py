"""Event logs of simulated runs (policies/eventlog.py), and what becomes of a log when it is relived."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies import messages as m
from policies.eventlog import Entry, Header, read_log, write_line
from policies.scheduler import Scheduler
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.timed import TimedJob, score
from policies.simulator.relive import Relived, Tally, decide_anew, relive
from policies.simulator.simulation import Simulation


def record(path: str, job: TimedJob, told: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Simulate, and write what the scheduler heard and answered to a new file. The job's policies are import paths."""
    trace = job.source.load()
    setup = job.wanted.build(trace)
    num_events = 0
    try:
        with Path(path).open("xb") as file:
            file.write(write_line(Header(config=setup.scheduler)))

            def write(now: float, event: m.Event, commands: list[m.Command]) -> None:
                nonlocal num_events
                num_events += 1
                file.write(write_line(Entry(now=now, event=event, commands=tuple(commands))))

            result = Simulation(trace, setup, seed=job.seed, event_sink=write).run(told)
    except FileExistsError:
        raise LabError(f"{path} exists: name another file, or remove it") from None
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror or error}") from None
    num_bytes = Path(path).stat().st_size
    return {"log": path, "num_events": num_events, "num_bytes": num_bytes, "setup": setup.name, **score(result)}


def relived(path: str) -> dict[str, Any]:
    """Whether today's scheduler and policies answer as recorded: `is_equal`, counts, the first divergence."""
    found: Relived = _of_log(path, lambda: relive(read_log(path)))
    return {
        "log": path,
        "is_equal": found.divergence is None,
        "num_lives": found.num_lives,
        "num_events": found.num_events,
        "num_commands": found.num_commands,
        "divergence": None if found.divergence is None else str(found.divergence),
        "cut_short": found.cut_short,
    }


def decided_anew(path: str, policies: Mapping[str, str]) -> dict[str, Any]:
    """What other policies would have commanded on the same events: an open loop, see relive.py."""
    changes: dict[str, Any] = dict(policies)

    def make(config: m.SchedulerConfig) -> Scheduler:
        return Scheduler(replace(config, **changes))

    found = _of_log(path, lambda: decide_anew(read_log(path), make))
    return {
        "log": path,
        "is_open_loop": True,
        "changed": changes,
        "num_events": found.num_events,
        "num_events_answered_otherwise": found.num_events_answered_otherwise,
        "recorded": _counts(found.recorded),
        "decided": _counts(found.decided),
        "policy_faults": dict(found.policy_faults),
    }


def _counts(tally: Tally) -> dict[str, dict[str, int]]:
    names = ("commands", "reused_tokens", "recomputed_tokens")
    return {name: dict(sorted(getattr(tally, name).items())) for name in names}


def _of_log(path: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        words = str(error)
        raise LabError(words if words.startswith(path) else f"{path}: {words}") from None
