"""Runs of simulated clusters: reliable ones, where nothing may ever go wrong, and unreliable ones."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.messages import SchedulerConfig

from tests.policies.runs import run
from tests.policies.world import Setup, World

EXAMPLES = int(os.environ.get("WORLD_EXAMPLES", "60"))


@st.composite
def setups(draw: st.DrawFn, *, is_reliable: bool) -> Setup:
    """Tight budgets: a full chunk has 40 bytes, a conversation up to 13 chunks."""
    low = draw(st.sampled_from((0.5, 0.8, 1.0)))
    config = SchedulerConfig(
        high_watermark=draw(st.sampled_from([share for share in (0.5, 0.9, 1.0) if share >= low])),
        low_watermark=low,
        write_through=draw(st.booleans()),
        max_fetches_in_flight=draw(st.sampled_from((1, 8))),
        max_pending_offers=draw(st.sampled_from((2, 100))),
        session_ttl_s=draw(st.sampled_from((20.0, 3600.0))),
        ghosts=draw(st.sampled_from((3, 1000))),
        answer_reserve=draw(st.sampled_from((0.0, 1.0))),
        eviction=draw(st.sampled_from(("LookAhead", "Lru", "Fifo")).map(lambda name: f"policies.eviction:{name}")),
        prefetch=draw(st.sampled_from(("LookAhead", "Off")).map(lambda name: f"policies.prefetch:{name}")),
        placement=draw(
            st.sampled_from(("EarliestStart", "LeastLoaded")).map(lambda name: f"policies.placement:{name}")
        ),
    )
    return Setup(
        config=config,
        num_nodes=draw(st.integers(1, 3)),
        num_replicas=draw(st.integers(1, 3)),
        dram_bytes=draw(st.sampled_from((300, 30, 100, 1000))),
        ssd_bytes=draw(st.sampled_from((600, 0, 100))),
        object_bytes=draw(st.sampled_from((0, 400))),
        max_running_turns=draw(st.integers(1, 3)),
        max_running_tokens=draw(st.sampled_from((30, 100))),
        is_reliable=is_reliable,
    )


def many(function: Any) -> Any:
    return settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )(function)


@many
@given(setup=setups(is_reliable=True), data=st.binary(max_size=600))
def test_reliable_world(setup: Setup, data: bytes) -> None:
    """Nothing is refused by a store, no leased chunk is missing, and the catalog ends up being the truth."""
    run(World(setup, data))


@many
@given(setup=setups(is_reliable=False), data=st.binary(max_size=600))
def test_unreliable_world(setup: Setup, data: bytes) -> None:
    run(World(setup, data))
