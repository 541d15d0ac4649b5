"""Runs of simulated clusters: reliable ones, where nothing may ever go wrong, and unreliable ones."""

from __future__ import annotations

import os
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.messages import SchedulerConfig
from tests.policies.parts import Setup
from tests.policies.runs import run
from tests.policies.world import World

EXAMPLES = int(os.environ.get("WORLD_EXAMPLES", "120"))


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


choices = st.builds(lambda size, seed: Random(seed).randbytes(size), st.integers(20, 1200), st.integers(0, 1 << 32))


class Chaos:
    """A policy of every kind that decides at random, and now and then raises or answers nonsense."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._known: dict[Any, set[str]] = {}

    def _stumble(self) -> None:
        if self._random.random() < 0.1:
            raise RuntimeError("chaos")

    def add(self, place: Any, chunk: Any) -> None:
        self._stumble()
        self._known.setdefault(place, set()).add(chunk.key)

    def remove(self, place: Any, key: str, *, evicted: bool) -> None:
        self._stumble()
        self._known[place].discard(key)

    def victims(self, place: Any, count: int, outlook: Any) -> list[str]:
        self._stumble()
        known = sorted(self._known.get(place, ()))
        return self._random.sample(known, min(count, len(known)))

    def may_drop(self, chunk: Any, position: int | None, outlook: Any) -> Any:
        self._stumble()
        return self._random.choice((True, False, None))

    def window(self, outlook: Any) -> Any:
        self._stumble()
        return self._random.choice((0, 1, 9, None))

    def admit(self, offer: Any, outlook: Any) -> Any:
        self._stumble()
        return self._random.choice((True, True, False, None))

    def choose(self, *offered: Any) -> Any:
        """Of a prefetch or a placement policy."""
        self._stumble()
        if len(offered) == 1:
            return self._random.sample(offered[0], self._random.randrange(len(offered[0]) + 1))
        return self._random.choice([*(option.replica_id for option in offered[1]), "nobody"])


def many(function: Any) -> Any:
    return settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )(function)


@many
@given(setup=setups(is_reliable=True), data=choices)
def test_reliable_world(setup: Setup, data: bytes) -> None:
    """Nothing is refused by a store, no leased chunk is missing, and the catalog ends up being the truth."""
    run(World(setup, data))


@many
@given(setup=setups(is_reliable=False), data=choices)
def test_unreliable_world(setup: Setup, data: bytes) -> None:
    run(World(setup, data))


@many
@given(setup=setups(is_reliable=True), data=choices, seed=st.integers(0, 1 << 32))
def test_reliable_world_with_chaotic_policies(setup: Setup, data: bytes, seed: int) -> None:
    """However badly policies decide: turns are served, budgets kept, leased chunks there."""
    chaos = Chaos(seed)
    run(World(setup, data, eviction=chaos, prefetch=chaos, placement=chaos, admission=chaos))


@many
@given(setup=setups(is_reliable=False), data=choices, seed=st.integers(0, 1 << 32))
def test_unreliable_world_with_chaotic_policies(setup: Setup, data: bytes, seed: int) -> None:
    chaos = Chaos(seed)
    run(World(setup, data, eviction=chaos, prefetch=chaos, placement=chaos, admission=chaos))
