"""Small traces and a small cluster for the timed simulator: round numbers, 4 bytes of KV a token."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from policies.messages import SchedulerConfig
from policies.simulator.hardware import EngineSpeed, LinkSpeeds, Machine, Model
from policies.simulator.setup import Setup, TierBudgets
from policies.simulator.trace import Request, Trace

BLOCK = 16
MODEL = Model(name="small", num_parameters=1e6, num_layers=1, hidden_size=1, kv_size=1)
BYTES = MODEL.kv_bytes_per_token
LINKS = LinkSpeeds(
    dram_load=BYTES * 10_000,
    dram_save=BYTES * 10_000,
    ssd_read=BYTES * 2_000,
    ssd_write=BYTES * 2_000,
    network=BYTES * 1_000,
    object_read=BYTES * 500,
    object_write=BYTES * 500,
    ssd_latency_s=0.0,
    network_latency_s=0.0,
    object_latency_s=0.0,
)
MACHINE = Machine(name="small", flops=1e12, hbm_bytes_per_s=1e12, hbm_bytes=1e9, links=LINKS)
ENGINE = EngineSpeed(prefill_s_per_token=1e-3, step_s=0.01, step_s_per_turn=0.001, max_step_tokens=100, kv_tokens=4_000)


def setup_of(*, links: LinkSpeeds = LINKS, scheduler: dict[str, Any] | None = None, **changes: Any) -> Setup:
    """One node with one replica of four slots; `scheduler` changes its configuration."""
    base: dict[str, Any] = {
        "name": "small",
        "machine": replace(MACHINE, links=links),
        "model": MODEL,
        "budgets": TierBudgets(dram=4_000, unit="tokens"),
        "engine": ENGINE,
        "max_running_turns": 4,
        "chunk_tokens": 2 * BLOCK,
        "scheduler": SchedulerConfig(**(scheduler or {})),
    }
    return Setup(**{**base, **changes})


def request(request_id: int, input_tokens: int, output_tokens: int = 1, **rest: Any) -> Request:
    """A request with lengths only, which arrives at second `request_id`."""
    base = {"session_id": request_id, "arrival_s": float(request_id)}
    return Request(request_id=request_id, input_tokens=input_tokens, output_tokens=output_tokens, **{**base, **rest})


def trace_of(*requests: Request, block_tokens: int = 0) -> Trace:
    return Trace(name="small", block_tokens=block_tokens, requests=requests)


def blocks_of(session_id: int, num_tokens: int, num_system: int = 0) -> tuple[int, ...]:
    """Ids of the full blocks of a session's text; what lies in the first `num_system` tokens is the same for all."""
    return tuple(
        i if (i + 1) * BLOCK <= num_system else 1_000 * (session_id + 1) + i for i in range(num_tokens // BLOCK)
    )


def random_trace(
    seed: int,
    *,
    num_sessions: int = 8,
    num_turns: int = 5,
    num_system: int = 3 * BLOCK,
    gap_s: float = 0.5,
    unit: int = 1,
    answers: bool = True,
) -> Trace:
    """Sessions whose turns take turns at random. Lengths are multiples of `unit`; no `answers`: one token each."""
    chance = Random(seed)
    order = [session for session in range(num_sessions) for _ in range(num_turns)]
    chance.shuffle(order)
    last: dict[int, Request] = {}
    requests = []
    for request_id, session_id in enumerate(order):
        parent = last.get(session_id)
        before = num_system if parent is None else parent.input_tokens + (parent.output_tokens if answers else 0)
        made = Request(
            request_id=request_id,
            session_id=session_id,
            arrival_s=request_id * gap_s * (0.5 + chance.random()),
            input_tokens=before + unit * chance.randint(1, max(1, 60 // unit)),
            output_tokens=chance.randint(1, 40) if answers else 1,
            turn=0 if parent is None else parent.turn + 1,
            parent=None if parent is None else parent.request_id,
            think_s=None if parent is None else chance.random(),
        )
        last[session_id] = replace(made, blocks=blocks_of(session_id, made.input_tokens, num_system))
        requests.append(last[session_id])
    return Trace(name=f"random {seed}", block_tokens=BLOCK, requests=requests)
