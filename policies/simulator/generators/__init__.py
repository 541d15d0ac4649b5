"""Making traces: one file per workload, deterministic by its seed.

    trace = make_trace("chat:sessions=1000,seed=3")
    trace = make_trace("agents:sessions=20+scan:scans_per_s=2,block_tokens=512")      a mix

| name | what |
|---|---|
| chat     | ShareGPT's shape: short conversations in a small window |
| zipf     | system prompts or documents shared by many sessions |
| agents   | long, strictly growing contexts with tools' pauses |
| scan     | chat, and a flood of long prompts that never come back |
| branches | several follow-ups of one answer |
| retries  | the same prompt again, shortly after |
| edits    | follow-ups that change what was said |

Another workload is a frozen dataclass with `trace()` and a line in GENERATORS. Invariants: arrivals ascend, parents
come before their children, an input of n tokens has ceil(n / block_tokens) blocks, and a child's blocks begin with its
parent's full ones unless it was truncated or edited.
"""

from __future__ import annotations

import re
from typing import Protocol

from policies.simulator.generators.agents import Agents
from policies.simulator.generators.branches import Branches
from policies.simulator.generators.chat import Chat
from policies.simulator.generators.edits import Edits
from policies.simulator.generators.mix import mix
from policies.simulator.generators.retries import Retries
from policies.simulator.generators.scan import Scan
from policies.simulator.generators.zipf import SharedPrefixes
from policies.simulator.spec import from_spec
from policies.simulator.trace import Trace


class Generator(Protocol):
    """Makes one workload; its parameters are the fields of a frozen dataclass, checked when it is made."""

    def trace(self) -> Trace:
        """The same trace every time."""


GENERATORS: dict[str, type[Generator]] = {
    "chat": Chat,
    "zipf": SharedPrefixes,
    "agents": Agents,
    "scan": Scan,
    "branches": Branches,
    "retries": Retries,
    "edits": Edits,
}


def make_trace(spec: str) -> Trace:
    """The trace described by "name:parameter=value,..."; several of them joined by + are mixed.

    ValueError lists the known names, or the parameters of a name with their defaults.
    """
    generators = [from_spec("trace", GENERATORS, part) for part in re.split(r"\+(?=\s*[a-z])", spec)]
    traces = [generator.trace() for generator in generators]
    return traces[0] if len(traces) == 1 else mix(traces, name=spec)


__all__ = ["GENERATORS", "Generator", "make_trace", "mix"]
