"""`reprise lab`: options in; tables for people, or one JSON object for programs, out.

Exit codes: 0 done, 1 a log diverges, a file was skipped or a policy failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from cluster.lab import verbs
from policies.plugins import PolicyError
from policies.simulator.generators import GENERATORS
from policies.simulator.hardware import MACHINES, MODELS, SetupError
from policies.simulator.lab.errors import LabError
from policies.simulator.lab.naming import DEFAULT_EVICTION
from policies.simulator.lab.wanted import SETUP_WORDS
from policies.simulator.simulation import POLICY_KINDS, SimulationStuck
from policies.simulator.trace import TraceError

NAMES = f"""
traces:    a file, a URL (s3://, gs://, ...), or a generator: {", ".join(GENERATORS)}, as in chat:sessions=500,seed=3
policies:  a name of ours (Lru), module:Class, or file.py:Class(option=value); see docs/policies.md
sizes:     64GiB, 500MB (bytes), 1Mtok (tokens of KV), 5% (of the trace's footprint)
set-ups:
"""
SETUPS_HELP = NAMES + "".join(f"  {name:15}{words}\n" for name, words in SETUP_WORDS.items())

EXAMPLES = {
    "run": """
  reprise lab run chat:sessions=200
  reprise lab run chat.parquet --setup overload --eviction Lru --json
  reprise lab run chat:sessions=200 --load 1.2 --dram 100GB --ssd 1TB --hardware h100 --model llama-3-8b --gpus 1
""",
    "compare": """
  reprise lab compare chat:sessions=200 --eviction Fifo --eviction examples/loyal_policy.py:Loyal
  reprise lab compare chat.parquet --eviction Returns --setup overload --limit 2000 --out runs/compare
""",
    "sweep": """
  reprise lab sweep zipf:sessions=500 --capacity 1,2,5,10,25 --eviction Fifo --out runs/sweep
  reprise lab sweep chat:sessions=200 --load 0.8,1.0,1.6 --eviction LookAhead --out runs/loads
  reprise lab sweep chat:sessions=200 --load 1.0 --capacity 5,25        (DRAM in % of the footprint)
""",
    "oracle": """
  reprise lab oracle zipf:sessions=500 --capacity 5,10
  reprise lab oracle chat:sessions=300 --capacity 10 --level session --eviction Fifo
  reprise lab oracle chat.parquet --capacity 5,10 --warm-up 0.5        (only the second half counts)
""",
    "record": """
  reprise lab record run.jsonl --trace chat:sessions=50
  reprise batch chats.jsonl --model ./models/demo --out runs/a --record live.jsonl     (a live cluster)
""",
    "replay": """
  reprise lab replay run.jsonl
  reprise lab replay run.jsonl --eviction Lru
""",
    "score": """
  reprise lab score ./traces
  reprise lab score ./traces --capacity 5,25 --level block --limit 2000 --timed-turns 500 --jobs 2 --json
""",
}


def add_to(commands: Any) -> None:
    """`lab` as one of the commands of an argument parser."""
    text = "Try policies on traces: the real scheduler under a virtual clock."
    lab = _parser(commands, "lab", text, "\n".join(["examples:", *(e.strip("\n") for e in EXAMPLES.values())]))
    added = lab.add_subparsers(required=True, metavar="VERB")
    _add_run(added)
    _add_compare(added)
    _add_sweep(added)
    _add_oracle(added)
    _add_logs(added)
    _add_score(added)


def guarded(verb: Callable[[argparse.Namespace, Any], int]) -> Callable[[argparse.Namespace], int]:
    """The verb, with expected errors in one line. Whatever a library prints, stdout has results only."""

    def run(options: argparse.Namespace) -> int:
        stdout = sys.stdout
        with redirect_stdout(sys.stderr):
            try:
                return verb(options, stdout)
            except (LabError, TraceError, SetupError) as error:
                return _fail(str(error), 2)
            except (PolicyError, SimulationStuck) as error:
                return _fail(str(error), 1)
            except KeyboardInterrupt:
                return _fail("interrupted", 130)

    return run


def _fail(words: str, code: int) -> int:
    print(f"reprise: {words}", file=sys.stderr)
    return code


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return added


def _verb(commands: Any, name: str, text: str, verb: Callable[[argparse.Namespace, Any], int]) -> Any:
    parser = _parser(commands, name, text.replace("%", "%%"), (SETUPS_HELP + "\nexamples:" + EXAMPLES[name]))
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.set_defaults(run=guarded(verb))
    return parser


def _add_run(commands: Any) -> None:
    parser = _verb(commands, "run", "One simulated run.", verbs.run)
    _add_trace(parser)
    _add_setup(parser)
    _add_policies(parser)
    _add_out(parser, "a picture of where recomputed tokens were lost")


def _add_compare(commands: Any) -> None:
    text = "The same trace and set-up under several eviction policies, beside LRU and the oracle."
    parser = _verb(commands, "compare", text, verbs.compare)
    _add_trace(parser)
    _add_setup(parser)
    _add_policies(parser, several=True)
    parser.add_argument("--no-oracle", action="store_true", help="leave the oracle out, and the regret with it")
    _add_jobs(parser)
    _add_out(parser, "a picture of where recomputed tokens were lost")


def _add_sweep(commands: Any) -> None:
    text = "Hit rate by capacity with the oracle as ceiling (untimed); or, with --load, TTFT and queue by load."
    parser = _verb(commands, "sweep", text, verbs.sweep)
    _add_trace(parser)
    parser.add_argument("--capacity", help="%% of the footprint: 1,2,5,10,25; with --load, of DRAM (as set up)")
    parser.add_argument("--level", choices=("block", "session"), default="block", help="of untimed caches (block)")
    _add_setup(parser, load="offered loads, for timed runs: 0.8,1.0,1.6")
    _add_policies(parser, several=True)
    _add_jobs(parser)
    _add_out(parser, "pictures")


def _add_oracle(commands: Any) -> None:
    parser = _verb(commands, "oracle", "LRU, policies and the oracle by capacity, untimed.", verbs.oracle)
    _add_trace(parser)
    parser.add_argument("--capacity", default="1,5,10,25,50", help="%% of the footprint (1,5,10,25,50)")
    parser.add_argument("--level", choices=("block", "session"), default="block", help="what a cache keeps (block)")
    parser.add_argument(
        "--eviction", action="append", default=[], help=f"may be given again ({DEFAULT_EVICTION.partition(':')[2]})"
    )
    _add_warm_up(parser)
    _add_jobs(parser)


def _add_logs(commands: Any) -> None:
    parser = _verb(commands, "record", "Write the event log of a simulated run.", verbs.record_log)
    parser.add_argument("log", metavar="OUT", help="a new file")
    _add_trace(parser, option=True)
    _add_setup(parser)
    _add_policies(parser)
    text = "Relive an event log: are all commands the same? With other policies: what they would have said (open loop)."
    parser = _verb(commands, "replay", text, verbs.replay_log)
    parser.add_argument("log", metavar="LOG", help="of `reprise lab record` or `reprise batch --record`")
    _add_policies(parser, strict=False)


def _add_score(commands: Any) -> None:
    parser = _verb(commands, "score", "LRU, the default policy and the oracle over a folder of traces.", verbs.score)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--capacity", default="1,5,10,25,50", help="%% of the footprint (1,5,10,25,50)")
    parser.add_argument("--level", choices=("auto", "block", "session"), default="auto", help="auto: all that fit")
    parser.add_argument("--limit", type=int, help="only the first N records of each file")
    parser.add_argument("--eviction", action="append", default=[], help="in place of the default policy; also several")
    parser.add_argument("--timed-turns", type=int, default=500, help="turns of the timed runs, 0 for none (500)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    _add_setup(parser)
    parser.add_argument("--strict", action="store_true", help="the first fault of a policy ends its run")
    _add_jobs(parser)


def _add_trace(parser: Any, option: bool = False) -> None:
    words = "a file, URL or generator's spec, see below"
    if option:
        parser.add_argument("--trace", metavar="TRACE", required=True, help=words)
    else:
        parser.add_argument("trace", metavar="TRACE", help=words)
    parser.add_argument("--format", help="of a file (told by its content)")
    parser.add_argument("--limit", type=int, help="only the first N records of a file, or turns of a generator")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation; a generator has its own (0)")


def _add_setup(parser: Any, load: str = 'offered load, or "recorded" (as set up)') -> None:
    group = parser.add_argument_group("set-up", "of timed runs; without these: as the named set-up has it")
    group.add_argument("--setup", default="tiered", choices=tuple(SETUP_WORDS), help="see below (tiered)")
    group.add_argument("--load", help=load)
    group.add_argument("--nodes", type=int)
    group.add_argument("--dram", metavar="SIZE", help="of one node")
    group.add_argument("--ssd", metavar="SIZE", help="of one node; 0 for none")
    group.add_argument("--bucket", metavar="SIZE", help="object storage, of all nodes together; 0 for none")
    group.add_argument("--hardware", help=", ".join(MACHINES))
    group.add_argument("--model", help=", ".join(MODELS))
    group.add_argument("--gpus", type=int, help="of one replica")
    group.add_argument("--advice", type=float, metavar="SECONDS", help="a follow-up is announced so long before (0)")
    _add_warm_up(group)


def _add_warm_up(parser: Any) -> None:
    parser.add_argument(
        "--warm-up", type=float, metavar="SHARE", help="of the turns, the first ones: they do not count"
    )


def _add_policies(parser: Any, several: bool = False, strict: bool = True) -> None:
    group = parser.add_argument_group("policies")
    if several:
        group.add_argument("--eviction", action="append", default=[], help="may be given again")
    else:
        group.add_argument("--eviction")
    for kind in POLICY_KINDS[1:]:
        group.add_argument(f"--{kind.replace('_', '-')}", metavar="POLICY")
    if strict:
        group.add_argument("--strict", action="store_true", help="the first fault of a policy ends the run")


def _add_jobs(parser: Any) -> None:
    parser.add_argument("--jobs", type=int, help="runs at a time (one per core); 1: in this process, without Ray")


def _add_out(parser: Any, what: str) -> None:
    parser.add_argument("--out", metavar="DIR", help=f"folder for result.json and {what}")
