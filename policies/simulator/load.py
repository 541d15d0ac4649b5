"""How much work a trace offers to a cluster, and how arrivals are scaled to make it so much.

    offered load = seconds that the replicas would need for all turns / seconds from the first arrival to the last

where every prompt is computed without any reuse, and every answer is decoded in full batches. At 1 a cluster that does
not reuse is just saturated; reuse makes room. Arrivals are scaled by one factor; think times are people's and are not,
so where they are known, follow-ups may come later than their share, and the load that really comes is lower.
"""

from __future__ import annotations

from policies.simulator.hardware import EngineSpeed, SetupError
from policies.simulator.setup import Setup
from policies.simulator.trace import Request, Trace


def recorded_load(trace: Trace, setup: Setup) -> float:
    """The offered load with arrivals as recorded. SetupError when the trace takes no time."""
    if trace.duration_s <= 0:
        raise SetupError(f"{trace.name} has no duration, so no load can be told; set Setup.offered_load to None")
    return offered_work_s(trace, setup) / (setup.num_replicas * trace.duration_s)


def arrival_scale(trace: Trace, setup: Setup) -> float:
    """The factor on arrival times that gives the set-up's offered load; 1 if it has none. SetupError as above."""
    return 1.0 if setup.offered_load is None else recorded_load(trace, setup) / setup.offered_load


def offered_work_s(trace: Trace, setup: Setup) -> float:
    """Seconds that one replica would need for the whole trace."""
    speed = setup.speed
    return sum(_work_s(request, speed, setup.max_running_turns) for request in trace)


def _work_s(request: Request, speed: EngineSpeed, batch: int) -> float:
    num_steps = max(0, request.output_tokens - 1)
    context = batch * (request.input_tokens + num_steps / 2)
    return speed.prefill_s(0, request.input_tokens) + num_steps * speed.decode_step_s(batch, context) / batch
