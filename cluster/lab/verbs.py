"""What each verb of `reprise lab` does: ask the laboratory, show what it found, say how it went as an exit code."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TextIO

from cluster.lab import render
from cluster.lab.showing import folder_of, progress, say, show, write
from cluster.lab.wishes import evictions_of, refuse_setup, source_of, wanted_of
from policies.simulator.lab import logs, plots
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.jobs import Job, Outcome, num_jobs_at_a_time, run_all
from policies.simulator.lab.naming import Size, checked_policies, parse_numbers, short_name
from policies.simulator.lab.score import cut, faults_of, look_into, mean_regrets, problems_of
from policies.simulator.lab.timed import TimedJob, by_load, timed_jobs, timed_rows
from policies.simulator.lab.untimed import hit_rate_jobs, hit_rate_rows
from policies.simulator.replay import Level
from policies.simulator.simulation import POLICY_KINDS

Row = dict[str, Any]


def run(options: argparse.Namespace, stdout: TextIO) -> int:
    out = folder_of(options.out)
    job = TimedJob(source=source_of(options), wanted=wanted_of(options, options.load), seed=options.seed, is_whole=True)
    with progress() as told:
        found = job.run(lambda done, of: told(job.words, 0, 1, done / of))
    row = {**found, "trace": options.trace, "policy": None}
    show(row, [render.single(row)], options.json, stdout)
    write(row, [row], out, plots.draw_causes)
    return _tell([row])


def compare(options: argparse.Namespace, stdout: TextIO) -> int:
    out = folder_of(options.out)
    wanted = wanted_of(options, options.load)
    evictions = evictions_of(options)
    jobs = timed_jobs(source_of(options), [wanted], evictions, options.seed, with_oracle=not options.no_oracle)
    rows = timed_rows(jobs, _outcomes(jobs, options.jobs))
    found = {"trace": options.trace, "rows": rows}
    show(found, [render.scores(rows)], options.json, stdout)
    write(found, rows, out, plots.draw_causes)
    return _tell(rows)


def sweep(options: argparse.Namespace, stdout: TextIO) -> int:
    if options.load is None and options.capacity is None:
        raise LabError("nothing to sweep over: give --capacity 1,5,25 (untimed), or --load 0.8,1.0,1.6 (timed)")
    return _sweep_loads(options, stdout) if options.load is not None else _sweep_capacities(options, stdout)


def _sweep_capacities(options: argparse.Namespace, stdout: TextIO) -> int:
    refuse_setup(options)
    out = folder_of(options.out)
    rows = _hit_rates(options)
    found = {"trace": options.trace, "rows": rows}
    show(found, [render.hit_rates(rows)], options.json, stdout)
    write(found, rows, out, plots.draw_hit_rates)
    return _tell(rows)


def _sweep_loads(options: argparse.Namespace, stdout: TextIO) -> int:
    out = folder_of(options.out)
    loads = parse_numbers("--load", options.load)
    shares = parse_numbers("--capacity", options.capacity, 100) if options.capacity else []
    wanteds = by_load(wanted_of(options), loads, [Size(percent / 100, "share") for percent in shares])
    jobs = timed_jobs(source_of(options), wanteds, evictions_of(options), options.seed)
    rows = timed_rows(jobs, _outcomes(jobs, options.jobs))
    found = {"trace": options.trace, "rows": rows}
    show(found, [render.scores(rows)], options.json, stdout)
    write(found, rows, out, plots.draw_loads, plots.draw_causes)
    return _tell(rows)


def oracle(options: argparse.Namespace, stdout: TextIO) -> int:
    rows = _hit_rates(options)
    show({"trace": options.trace, "rows": rows}, [render.hit_rates(rows)], options.json, stdout)
    return _tell(rows)


def record_log(options: argparse.Namespace, stdout: TextIO) -> int:
    wanted = wanted_of(options, options.load)
    job = TimedJob(source=source_of(options), wanted=wanted, seed=options.seed)
    with progress() as told:
        found = logs.record(options.log, job, lambda done, of: told(job.words, 0, 1, done / of))
    found |= {"trace": options.trace, "policy": None}
    words = f"{options.log}: {found['num_events']:,} events, {found['num_bytes']:,} bytes"
    show(found, [render.single(found), words], options.json, stdout)
    return 0


def replay_log(options: argparse.Namespace, stdout: TextIO) -> int:
    policies = checked_policies({kind: getattr(options, kind) for kind in POLICY_KINDS})
    if policies:
        return _decide_anew(options, policies, stdout)
    found = logs.relived(options.log)
    counts = f"{found['num_events']:,} events in {found['num_lives']} lives, {found['num_commands']:,} commands"
    verdict = "all commands equal" if found["is_equal"] else f"DIVERGES at {found['divergence']}"
    show(found, ["; ".join([f"{counts}: {verdict}", *found["cut_short"]])], options.json, stdout)
    return 0 if found["is_equal"] else 1


def _decide_anew(options: argparse.Namespace, policies: Mapping[str, str], stdout: TextIO) -> int:
    found = logs.decided_anew(options.log, policies)
    count, total = found["num_events_answered_otherwise"], found["num_events"]
    words = f"{count:,} of {total:,} events answered otherwise; for hit rates and latencies: reprise lab compare"
    show(found, [render.tallies(found), words], options.json, stdout)
    if found["policy_faults"]:
        say(f"policy faults: {dict(found['policy_faults'])}; `reprise lab run --strict` names the line")
    return 1 if found["policy_faults"] else 0


def score(options: argparse.Namespace, stdout: TextIO) -> int:
    percents, evictions = parse_numbers("--capacity", options.capacity, 100), evictions_of(options)
    if options.timed_turns < 0:
        raise LabError(f"--timed-turns is {options.timed_turns}: give 1 or more, or 0 for no timed runs")
    wanted = replace(wanted_of(options, options.load), policies={})
    found = look_into(options.folder, level=options.level, limit=options.limit)
    for words in found.skipped.values():
        say(f"skipped: {words}")
    if not found.traces and not found.skipped:
        raise LabError(f"{options.folder} holds no traces: name a folder with Parquet, JSONL or CSV files")
    untimed = [
        job
        for source, levels in found.traces
        for job in hit_rate_jobs(source, levels, percents, evictions, options.warm_up or 0.0, is_strict=options.strict)
    ]
    timed = [
        job
        for source, _ in (found.traces if options.timed_turns else [])
        for job in timed_jobs(cut(source, options.timed_turns), [wanted], evictions, options.seed, with_oracle=False)
    ]
    outcomes = _outcomes([*untimed, *timed], options.jobs)
    rows = hit_rate_rows(untimed, outcomes[: len(untimed)])
    runs = timed_rows(timed, outcomes[len(untimed) :])
    regrets = mean_regrets(rows)
    made = {"rows": rows, "timed": runs, "mean_regret": regrets, "skipped": found.skipped}
    tables = [render.hit_rates(rows)] + ([render.scores(runs)] if runs else []) if rows else []
    show(made, [*tables, *_regret_words(regrets)], options.json, stdout)
    return max(_tell([*rows, *runs]), 1 if found.skipped else 0)


def _regret_words(regrets: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"mean regret, {level} level: {short_name(name)} {value:.3f}"
        for level, of in regrets.items()
        for name, value in of.items()
    ]


# --- parts ------------------------------------------------------------------------------------------------------------


def _hit_rates(options: argparse.Namespace) -> list[Row]:
    percents = parse_numbers("--capacity", options.capacity, 100)
    warm_up = options.warm_up or 0.0
    jobs = hit_rate_jobs(
        source_of(options),
        [Level(options.level)],
        percents,
        evictions_of(options),
        warm_up,
        is_strict=getattr(options, "strict", False),
    )
    return hit_rate_rows(jobs, _outcomes(jobs, options.jobs))


def _outcomes(jobs: Sequence[Job], at_a_time: int | None) -> list[Outcome]:
    """LabError when nothing could be done and it is the input's fault."""
    at_a_time = num_jobs_at_a_time(at_a_time, len(jobs))
    with progress() as told:
        outcomes = run_all(jobs, at_a_time, told)
    if outcomes and all(outcome.is_input for outcome in outcomes):
        raise LabError(outcomes[0].error)
    return outcomes


def _tell(rows: Sequence[Row]) -> int:
    """Says what went wrong in single runs, and what policies did wrong in runs that went on; the exit code."""
    problems = problems_of(rows)
    for words in [*problems, *faults_of(rows)]:
        say(words)
    return 1 if problems else 0
