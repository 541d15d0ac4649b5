"""Plans of steps from numbers alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from actors.engine.batching import Demand, Phase, Room, Work, plan_step

ROOM = Room(num_free_blocks=10, num_pending_blocks=0, block_tokens=4, max_step_tokens=16, max_running_turns=4)


def turn(
    arrival: int,
    computed: int,
    total: int,
    *,
    blocks: int | None = None,
    phase: Phase = Phase.COMPUTING,
    stop: int | None = None,
) -> Demand:
    if blocks is None:
        blocks = 0 if phase is Phase.QUEUED else ROOM.blocks_for(total)
    if phase is Phase.LOADING and stop is None:
        stop = computed
    return Demand(
        turn_id=f"t{arrival}",
        arrival=arrival,
        phase=phase,
        num_tokens=total,
        num_computed=computed,
        num_blocks=blocks,
        stop=stop,
    )


def test_decodes_first_then_prefill_in_order_of_arrival() -> None:
    plan = plan_step([turn(1, 0, 12), turn(2, 7, 8), turn(3, 0, 9), turn(4, 3, 4)], ROOM)
    assert plan.work == (Work("t2", 7, 1), Work("t4", 3, 1), Work("t1", 0, 12), Work("t3", 0, 2))
    assert plan.num_tokens == 16


def test_a_decode_that_crosses_into_a_new_block_gets_one() -> None:
    assert plan_step([turn(1, 8, 9, blocks=2)], ROOM).work == (Work("t1", 8, 1, 1),)
    assert plan_step([turn(1, 8, 9, blocks=3)], ROOM).work == (Work("t1", 8, 1, 0),)


def test_without_blocks_the_latest_arrival_gives_way() -> None:
    full = replace(ROOM, num_free_blocks=1)
    demands = [turn(1, 8, 9, blocks=2), turn(2, 4, 5, blocks=1), turn(3, 0, 9)]
    plan = plan_step(demands, full)
    assert plan.preempt == ("t3",)
    assert plan.work == (Work("t1", 8, 1, 1),)  # the older one got the block, t2 sits this step out


def test_the_latest_arrival_gives_way_to_itself() -> None:
    full = replace(ROOM, num_free_blocks=0)
    plan = plan_step([turn(1, 5, 6), turn(2, 4, 5, blocks=1)], full)
    assert plan.preempt == ("t2",)
    assert plan.work == (Work("t1", 5, 1),)


def test_nobody_is_preempted_while_blocks_come_back_by_themselves() -> None:
    demands = [turn(1, 8, 9, blocks=2), turn(2, 2, 3)]
    plan = plan_step(demands, replace(ROOM, num_free_blocks=0, num_pending_blocks=1))
    assert plan.preempt == ()
    assert plan.work == (Work("t2", 2, 1),)


def test_a_turn_that_loads_may_have_to_give_way() -> None:
    demands = [turn(1, 8, 9, blocks=2), turn(3, 0, 8, phase=Phase.LOADING)]
    assert plan_step(demands, replace(ROOM, num_free_blocks=0)).preempt == ("t3",)


def test_admission_is_in_order_and_leaves_everybody_a_block() -> None:
    queued = [turn(i, 0, 8, phase=Phase.QUEUED) for i in range(1, 6)]
    assert plan_step(queued, ROOM).admit == ("t1", "t2", "t3")  # 2, 2 + 1 spare, 2 + 2 spare; then 4 are left for 2 + 3
    assert plan_step(queued, replace(ROOM, max_running_turns=2)).admit == ("t1", "t2")
    big_first = [turn(1, 0, 60, phase=Phase.QUEUED), turn(2, 0, 4, phase=Phase.QUEUED)]
    assert plan_step(big_first, ROOM).admit == ()  # nobody overtakes


def test_nobody_joins_while_a_running_turn_has_no_room() -> None:
    starved = [turn(1, 8, 9, blocks=2), turn(2, 0, 4, phase=Phase.QUEUED)]
    assert plan_step(starved, replace(ROOM, num_free_blocks=0, num_pending_blocks=3)).admit == ()


def test_a_loading_turns_front_is_computed_when_nobody_else_wants_to() -> None:
    waits = turn(1, 0, 9, phase=Phase.LOADING)
    assert plan_step([waits], ROOM).work == ()
    front = turn(2, 4, 40, phase=Phase.LOADING, stop=12)
    decode = turn(3, 4, 5)
    assert plan_step([waits, front, decode], ROOM).work == (Work("t3", 4, 1), Work("t2", 4, 8))
    assert plan_step([front, turn(4, 0, 3)], ROOM).work == (Work("t4", 0, 3),)
    wide = turn(5, 0, 400, phase=Phase.LOADING, stop=300)
    assert plan_step([wide, decode], ROOM).work == (Work("t3", 4, 1), Work("t5", 0, 15))


def test_a_prefill_stops_where_the_pool_has_what_follows() -> None:
    assert plan_step([turn(1, 2, 40, stop=7)], ROOM).work == (Work("t1", 2, 5),)


def test_shared_blocks_are_not_asked_for() -> None:
    queued = turn(1, 0, 40, phase=Phase.QUEUED)  # 10 blocks
    tight = replace(ROOM, num_free_blocks=6)
    assert plan_step([queued], tight).admit == ()
    assert plan_step([replace(queued, num_blocks=4)], tight).admit == ("t1",)


@pytest.mark.parametrize("seed", range(5))
def test_plans_keep_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        room = replace(ROOM, num_free_blocks=rng.randint(0, 6), num_pending_blocks=rng.choice([0, 0, 2]))
        demands = []
        for arrival in range(rng.randint(0, 4)):
            total = rng.randint(1, 30)
            computed = rng.choice([0, max(0, total - 1), rng.randint(0, total - 1)])
            blocks = room.blocks_for(computed if computed == total - 1 and computed else total)
            stop = rng.choice([None, rng.randint(computed, total)])
            demands.append(turn(arrival, computed, total, blocks=blocks, phase=rng.choice(list(Phase)), stop=stop))
        plan = plan_step(demands, room)
        by_id = {demand.turn_id: demand for demand in demands}
        assert plan.num_tokens <= room.max_step_tokens
        assert sum(work.num_new_blocks for work in plan.work) <= room.num_free_blocks
        for work in plan.work:
            demand = by_id[work.turn_id]
            assert demand.phase is not Phase.QUEUED
            assert work.start == demand.num_computed
            assert demand.num_remaining == 1 or demand.stop is None or work.start + work.num_tokens <= demand.stop
            assert 1 <= work.num_tokens <= demand.num_remaining
            assert room.blocks_for(demand.num_computed + work.num_tokens) <= demand.num_blocks + work.num_new_blocks
            assert work.turn_id not in plan.preempt
        for turn_id in plan.preempt:
            assert by_id[turn_id].phase is not Phase.QUEUED
            assert by_id[turn_id].arrival == max(d.arrival for d in demands if d.phase is not Phase.QUEUED)
        assert len({work.turn_id for work in plan.work}) == len(plan.work)
