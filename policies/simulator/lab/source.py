"""Where a trace comes from: a file, a URL, or a generator's spec. Small enough to be sent to another process."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

from policies.simulator.generators import GENERATORS, make_trace
from policies.simulator.lab.errors import LabError
from policies.simulator.readers import read_trace
from policies.simulator.shaping import first
from policies.simulator.trace import Trace, TraceError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trace that can be loaded."""

    text: str
    """A path, a URL that Arrow knows, or a generator: "chat:sessions=500", see policies/simulator/generators."""
    format: str | None = None
    """Of a file; None: told by its content."""
    limit: int | None = None
    """At most the first so many records of a file, or requests of a generator."""
    max_turns: int | None = None
    """Of what was loaded, only the first so many requests."""

    def load(self) -> Trace:
        """LabError or TraceError, in one line. The latest ones are remembered."""
        return _loaded(self)

    @property
    def is_generator(self) -> bool:
        """Whether the text is a generator's, not a file's; a file of that name wins."""
        return self.text.split(":")[0].split("+")[0].strip() in GENERATORS and not os.path.exists(self.text)


@lru_cache(maxsize=2)
def _loaded(source: Source) -> Trace:
    for name in ("limit", "max_turns"):
        count = getattr(source, name)
        if count is not None and count < 1:
            raise LabError(f"{name.replace('_', '-')} is {count}: choose 1 or more, or leave it out")
    trace = _read(source)
    if not trace.requests:
        raise LabError(f"{source.text} has no requests: name another trace")
    return trace if source.max_turns is None else first(trace, source.max_turns)


def _read(source: Source) -> Trace:
    try:
        if not source.is_generator:
            return read_trace(source.text, format=source.format, limit=source.limit)
        made = replace(make_trace(source.text), name=source.text)
    except TraceError as error:
        if "/" in source.text or os.path.exists(source.text):
            raise
        raise LabError(f"{error}; or make a trace: {', '.join(f'{name}:...' for name in GENERATORS)}") from None
    except OSError as error:
        raise LabError(f"cannot read {source.text}: {error.strerror or error}") from None
    except ValueError as error:
        raise LabError(str(error)) from None
    return made if source.limit is None else first(made, source.limit)
