"""Reliving a recorded event log (policies/eventlog.py) with the real scheduler.

`relive` feeds every event at its time to a scheduler of the recorded configuration and compares the answers with the
recorded ones, line by line. A scheduler decides by nothing but its events and their times, so they are equal unless the
scheduler or a policy has changed since; where it was too slow a policy was benched, and the log says so.

`decide_anew` lets another scheduler (other policies, another configuration) hear the same events and counts what it
would have commanded. This loop is open: the events go on telling what came of the recorded commands. A turn sent to
another replica is never heard of again there, a chunk dropped in place of another is never confirmed. Fit to see how
often and in which direction policies differ; what that would have done to latencies and hit rates only a simulation
can tell. Reads no clock and starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from policies import messages as m
from policies.eventlog import Entry, Header, Record, Stopped
from policies.scheduler import Scheduler

Make = Callable[[m.SchedulerConfig], Scheduler]
Commands = tuple[m.Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where a scheduler first answered otherwise than recorded. An error is what it raised, if it did."""

    line: int
    life: int  # counted from 1
    now: float
    event: m.Event
    recorded: Commands
    answered: Commands
    recorded_error: str = ""
    answered_error: str = ""

    def __str__(self) -> str:
        event = type(self.event).__name__
        where = f"line {self.line} (life {self.life}, at {self.now:.6f} s, after {event})"
        if self.recorded_error != self.answered_error:
            return f"{where}: recorded {self.recorded_error or 'no error'}, got {self.answered_error or 'no error'}"
        at = _first_difference(self.recorded, self.answered)
        return f"{where}, command {at + 1}: recorded {_nth(self.recorded, at)}, got {_nth(self.answered, at)}"


@dataclass(slots=True)
class Relived:
    """What became of a log. Counts are of what was compared: up to and with the line that diverged, if one did."""

    num_lives: int = 0
    num_events: int = 0
    num_commands: int = 0
    divergence: Divergence | None = None
    cut_short: list[str] = field(default_factory=list)  # lives whose recording ended early: where and why

    def __str__(self) -> str:
        what = f"{self.num_events:,} events in {self.num_lives} lives, {self.num_commands:,} commands: "
        verdict = f"diverges at {self.divergence}" if self.divergence else "the same commands"
        return "; ".join([what + verdict, *self.cut_short])


def relive(records: Iterable[tuple[int, Record]], make: Make = Scheduler) -> Relived:
    """Compare until the first divergence. `records`: see `eventlog.read_log`, whose errors come through.

    ValueError, naming the line, when a recorded policy cannot be found here.
    """
    result = Relived()
    for line, life, record, scheduler in _lives(records, make):
        result.num_lives = life
        if isinstance(record, Stopped):
            result.cut_short.append(f"life {life} was recorded up to line {line} only: {record.stopped}")
        elif isinstance(record, Entry):
            result.num_events += 1
            result.num_commands += len(record.commands)
            answered, error = _answer(scheduler, record, line)
            if (answered, error) != (record.commands, record.error):
                result.divergence = Divergence(
                    line=line,
                    life=life,
                    now=record.now,
                    event=record.event,
                    recorded=record.commands,
                    answered=answered,
                    recorded_error=record.error,
                    answered_error=error,
                )
                return result
    return result


@dataclass(slots=True)
class Tally:
    """Commands by kind, and where the prompts' tokens were to come from by the plans of the Dispatches."""

    commands: Counter[str] = field(default_factory=Counter)
    reused_tokens: Counter[str] = field(default_factory=Counter)  # by tier
    recomputed_tokens: Counter[str] = field(default_factory=Counter)  # by cause

    def count(self, commands: Iterable[m.Command]) -> None:
        for command in commands:
            self.commands[type(command).__name__] += 1
            if isinstance(command, m.Dispatch):
                for step in command.plan.steps:
                    self.reused_tokens[step.tier.value] += step.num_tokens
                for cause, num_tokens in command.plan.recomputed:
                    self.recomputed_tokens[cause.value] += num_tokens


@dataclass(slots=True)
class Comparison:
    """The recorded decisions and another scheduler's, over the same events (see the module: an open loop)."""

    recorded: Tally = field(default_factory=Tally)
    decided: Tally = field(default_factory=Tally)
    num_events: int = 0
    num_events_answered_otherwise: int = 0
    policy_faults: Counter[str] = field(default_factory=Counter)


def decide_anew(records: Iterable[tuple[int, Record]], make: Make) -> Comparison:
    """What the schedulers that `make` makes (one a life, from the recorded configuration) would have commanded.

    decide_anew(read_log(file), lambda config: Scheduler(replace(config, eviction="policies.eviction:Lru")))
    """
    result = Comparison()
    schedulers = []
    for _, _, record, scheduler in _lives(records, make):
        if isinstance(record, Header):
            schedulers.append(scheduler)
        elif isinstance(record, Entry) and not record.error:
            commands = scheduler.handle(record.event, record.now)
            result.num_events += 1
            result.num_events_answered_otherwise += tuple(commands) != record.commands
            result.recorded.count(record.commands)
            result.decided.count(commands)
    for scheduler in schedulers:
        result.policy_faults.update(scheduler.snapshot()["policy_faults"])
    return result


def _lives(records: Iterable[tuple[int, Record]], make: Make) -> Iterable[tuple[int, int, Record, Scheduler]]:
    """(line, life, record, the life's scheduler). Every header begins a life."""
    scheduler: Scheduler | None = None
    life = 0
    for line, record in records:
        if isinstance(record, Header):
            life += 1
            try:
                scheduler = make(record.config)
            except ValueError as error:
                raise ValueError(f"line {line}: the recorded scheduler cannot be made here: {error}") from error
        assert scheduler is not None, "a log begins with a header"
        yield line, life, record, scheduler


def _answer(scheduler: Scheduler, entry: Entry, line: int) -> tuple[Commands, str]:
    """Its commands, or what it raised where it was recorded to raise; elsewhere an error comes through."""
    try:
        commands = tuple(scheduler.handle(entry.event, entry.now))
    except Exception as error:
        if not entry.error:
            error.add_note(f"while reliving line {line} of the event log")
            raise
        return (), f"{type(error).__name__}: {error}"
    scheduler.board.guard.bench(entry.benched)
    return commands, ""


def _first_difference(one: Commands, other: Commands) -> int:
    pairs = zip(one, other)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _nth(commands: Commands, number: int) -> str:
    return str(commands[number]) if number < len(commands) else "none"
