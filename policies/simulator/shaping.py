"""Traces made of traces: shorter, in two halves, at another load, with other blocks.

Every function returns a new trace and leaves the given one alone. Knows no format and no policy.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from policies.simulator.prompts import Prompt, PromptWriter
from policies.simulator.trace import Request, Trace


def first(trace: Trace, num_requests: int) -> Trace:
    """The first so many requests; parents come before their children, so none is missing."""
    if num_requests < 1:
        raise ValueError(f"first {num_requests} requests: choose 1 or more")
    return replace(trace, requests=tuple(trace.requests[:num_requests]))


def split(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """(what arrives in the first `share` of the trace's duration, the rest), to fit something and to judge it.

    A conversation that goes on in the rest begins there: its first request keeps its turn number and its prompt, and
    loses its parent and its think time. ValueError if either part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}: choose one between 0 and 1")
    requests = trace.requests
    begin_s = requests[0].arrival_s if requests else 0.0
    cut = bisect_left(requests, begin_s + share * trace.duration_s, key=lambda request: request.arrival_s)
    if not 0 < cut < len(requests):
        raise ValueError(f"{trace.name}: a share of {share} leaves a part without requests; choose another share")
    rest = requests[cut:]
    known = {request.request_id for request in rest}
    held_out = tuple(
        request if request.parent is None or request.parent in known else replace(request, parent=None, think_s=None)
        for request in rest
    )
    return replace(trace, requests=tuple(requests[:cut])), replace(trace, requests=held_out)


def scaled_arrivals(trace: Trace, factor: float) -> Trace:
    """All times since the first arrival times `factor`: 0.5 doubles the load. Think times stay: people do not hurry."""
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor is {factor}: choose a number above 0")
    begin_s = trace.requests[0].arrival_s if trace.requests else 0.0
    requests = tuple(replace(request, arrival_s=begin_s + (request.arrival_s - begin_s) * factor) for request in trace)
    return replace(trace, requests=requests)


def with_private_blocks(trace: Trace, block_tokens: int) -> Trace:
    """Blocks for a trace of lengths only. Nothing is shared but along the chain of follow-ups.

    A follow-up extends its parent's prompt: with the answer, if it is long enough to hold it (two follow-ups of one
    parent have that in common, too); as far as it goes, if not. One that is shorter than its parent's prompt was
    truncated, and its blocks are all new. ValueError if the trace has blocks.
    """
    if trace.block_tokens:
        raise ValueError(
            f"{trace.name} has blocks of {trace.block_tokens} tokens already; use `coarser` for larger ones"
        )
    writer = PromptWriter(block_tokens)
    prompts: dict[int, Prompt] = {}
    answered: dict[int, Prompt] = {}
    requests = []
    for request in trace:
        prompt = _private(writer, request, prompts, answered)
        prompts[request.request_id] = prompt
        answered[request.request_id] = writer.grown(prompt, request.output_tokens)
        requests.append(replace(request, blocks=prompt.blocks))
    return replace(trace, block_tokens=block_tokens, requests=tuple(requests))


def _private(writer: PromptWriter, request: Request, prompts: dict[int, Prompt], answered: dict[int, Prompt]) -> Prompt:
    """`prompts` and `answered` (with the answer): of earlier requests, by id."""
    num_tokens = request.input_tokens
    if request.parent not in prompts:
        return writer.new(num_tokens)
    for before in (answered[request.parent], prompts[request.parent]):
        if num_tokens >= before.num_tokens:
            return writer.grown(before, num_tokens - before.num_tokens)
    return writer.new(num_tokens)


def coarser(trace: Trace, block_tokens: int) -> Trace:
    """Blocks of `block_tokens` tokens, a multiple of what they have: each is named by the last fine block in it.

    A part-filled last block is kept where the fine blocks name the whole prompt, and left out where they do not.
    """
    fine = trace.block_tokens
    if not fine or block_tokens < fine or block_tokens % fine:
        have = f"blocks of {fine} tokens: choose a multiple of that" if fine else "no blocks: use `with_private_blocks`"
        raise ValueError(f"{trace.name} cannot have blocks of {block_tokens} tokens; it has {have}")
    requests = tuple(replace(request, blocks=_merged(request, fine, block_tokens // fine)) for request in trace)
    return replace(trace, block_tokens=block_tokens, requests=requests)


def _merged(request: Request, fine_tokens: int, num_merged: int) -> Sequence[int]:
    blocks = request.blocks
    merged = array("q", blocks[num_merged - 1 :: num_merged])
    is_whole = len(blocks) * fine_tokens >= request.input_tokens
    if is_whole and len(blocks) % num_merged:
        merged.append(blocks[-1])
    return merged
