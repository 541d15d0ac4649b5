"""Several traces as one: the tenants of one system, each with a workload of its own."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from policies.simulator.trace import Trace


def mix(traces: Sequence[Trace], name: str = "mix") -> Trace:
    """All requests in the order of their arrival, where equal in the order of the traces; nothing is shared.

    Requests, sessions and blocks are numbered anew, each from 0 on, so that no two traces have one in common. Arrivals
    stay as they are. ValueError if blocks differ in size.
    """
    if len({trace.block_tokens for trace in traces}) != 1:
        found = (
            ", ".join(f"{trace.name} has {trace.block_tokens or 'none'}" for trace in traces) or "there are no traces"
        )
        raise ValueError(f"a mix needs blocks of one size ({found}): use `coarser` or `with_private_blocks` first")
    sessions, blocks = _Numbers(), _Numbers()
    arrivals = [
        (request, which, sessions.of(which, request.session_id))
        for which, trace in enumerate(traces)
        for request in trace
    ]
    arrivals.sort(key=lambda arrival: arrival[0].arrival_s)
    numbers = {(which, request.request_id): number for number, (request, which, _) in enumerate(arrivals)}
    requests = tuple(
        replace(
            request,
            request_id=number,
            session_id=session_id,
            parent=None if request.parent is None else numbers[which, request.parent],
            blocks=array("q", [blocks.of(which, block) for block in request.blocks]),
        )
        for number, (request, which, session_id) in enumerate(arrivals)
    )
    return Trace(name=name, block_tokens=traces[0].block_tokens, requests=requests)


class _Numbers:
    """New numbers for old ones of several traces."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def of(self, which: int, old: int) -> int:
        return self._known.setdefault((which, old), len(self._known))
