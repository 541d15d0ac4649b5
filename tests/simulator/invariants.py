"""What holds of every trace, written down apart from the code that makes and reads them; and where real traces lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.simulator.trace import Request, Trace


def check(trace: Trace) -> None:
    """Order, parents, block counts, and that equal block ids mean equal prefixes."""
    arrivals = [request.arrival_s for request in trace]
    assert arrivals == sorted(arrivals)
    earlier: dict[int, Request] = {}
    for request in trace:
        assert request.request_id not in earlier
        assert request.input_tokens > 0
        assert request.output_tokens >= 0
        if request.parent is not None:
            parent = earlier[request.parent]
            assert (request.session_id, request.turn) == (parent.session_id, parent.turn + 1)
        earlier[request.request_id] = request
    check_blocks(trace)


def check_blocks(trace: Trace) -> None:
    """Behind an id stands always the same block before it, at the same place, filled in the same way."""
    size = trace.block_tokens
    meaning: dict[int, tuple[int, int | None, int]] = {}
    for request in trace:
        if size:
            assert len(request.blocks) in (request.input_tokens // size, -(-request.input_tokens // size))
        before: int | None = None
        for index, block in enumerate(request.blocks):
            filled = min(size, request.input_tokens - index * size)
            assert meaning.setdefault(block, (index, before, filled)) == (index, before, filled)
            before = block


def num_common(one: Request, two: Request) -> int:
    """Leading blocks that both have."""
    pairs = list(zip(one.blocks, two.blocks))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))


def extends(child: Request, parent: Request, block_tokens: int) -> bool:
    """Whether the child's prompt begins with the parent's, as far as full blocks tell."""
    return num_common(child, parent) >= parent.input_tokens // block_tokens


def by_id(trace: Trace) -> dict[int, Request]:
    return {request.request_id: request for request in trace}


def shared_data(*path: str) -> Path:
    """A file or folder of the real traces that lie beside the project; the test is skipped where they do not."""
    found = Path(__file__).resolve().parents[2].parent.joinpath("shared", "data", *path)
    if not found.exists():
        pytest.skip(f"no real traces beside the project (../shared/data/{'/'.join(path)})")
    return found
