"""What every policy of a kind must do. A new policy inherits the class of its kind and gives its `policy` fixture.

class TestMine(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return Mine()
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from policies.admission import AdmissionPolicy, Offer
from policies.eviction import EvictionPolicy
from policies.messages import SchedulerConfig, Tier
from policies.outlook import Outlook
from policies.placement import PlacementPolicy, ReplicaOption
from policies.places import Place
from policies.prefetch import FetchNeed, PrefetchPolicy
from policies.queue import Order
from tests.policies.parts import Setup
from tests.policies.runs import run
from tests.policies.texts import chunk_of, text, turn_of
from tests.policies.world import World

OUTLOOK = Outlook(num_waiting=10, dram_budget_bytes=1000, ssd_budget_bytes=1000, session_bytes=100.0)
DRAM, SSD = Place("n1", Tier.DRAM), Place("n1", Tier.SSD)


@dataclass(frozen=True)
class Facts:
    """A candidate, as an eviction policy sees it."""

    key: str
    start: int = 0
    end: int = 4
    num_bytes: int = 40
    stored_at: float = 0.0
    last_used: float = 0.0
    next_use: Order | None = None
    num_uses: int = 1
    turn: int = 1
    prompt_tokens: int = 0
    answer_tokens: int = 0


def draw_facts(random: Random, key: str) -> Facts:
    start = random.choice((0, 4, 8))
    return Facts(
        key=key,
        start=start,
        end=start + 4,
        stored_at=random.choice((1.0, 2.0, 3.0)),
        last_used=random.choice((3.0, 4.0, 5.0)),
        next_use=random.choice((None, None, (0, random.randrange(99)), (1, random.randrange(99)))),
        num_uses=random.randrange(1, 6),
        turn=random.randrange(9),
        answer_tokens=random.choice((0, 30, 600)),
    )


class EvictionContract:
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        raise NotImplementedError

    @pytest.mark.parametrize("seed", range(5))
    def test_victims_are_exactly_the_candidates(self, policy: EvictionPolicy, seed: int) -> None:
        random, known = Random(seed), {DRAM: dict[str, Facts](), SSD: dict[str, Facts]()}
        for _ in range(400):
            place = random.choice((DRAM, SSD))
            if known[place] and random.random() < 0.3:
                key = random.choice(sorted(known[place]))
                policy.remove(place, key, evicted=random.random() < 0.5)
                del known[place][key]
            else:
                facts = draw_facts(random, f"k{random.randrange(60)}")  # often again, with other facts
                policy.add(place, facts)
                known[place][facts.key] = facts
            for place, candidates in known.items():
                count = random.randrange(1, 20)
                victims = list(policy.victims(place, count, OUTLOOK))
                assert len(victims) == len(set(victims)) == min(count, len(candidates))
                assert set(victims) <= candidates.keys()
                assert list(policy.victims(place, count, OUTLOOK)) == victims, "asking changes nothing"
                one_more = list(policy.victims(place, count + 1, OUTLOOK))
                assert one_more[: len(victims)] == victims, "an order, not a choice"

    def test_nothing_known_no_victims(self, policy: EvictionPolicy) -> None:
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == []

    def test_places_are_apart(self, policy: EvictionPolicy) -> None:
        policy.add(DRAM, Facts("a"))
        policy.add(SSD, Facts("a"))
        policy.add(SSD, Facts("b"))
        policy.remove(SSD, "a", evicted=True)
        assert list(policy.victims(DRAM, 9, OUTLOOK)) == ["a"]
        assert list(policy.victims(SSD, 9, OUTLOOK)) == ["b"]

    def test_equals_go_deepest_first(self, policy: EvictionPolicy) -> None:
        for start in (4, 0, 8):
            policy.add(DRAM, Facts(f"k{start}", start=start, end=start + 4))
        assert list(policy.victims(DRAM, 3, OUTLOOK)) == ["k8", "k4", "k0"]

    @pytest.mark.parametrize("position", [None, 0, 5, 10**6])
    def test_may_drop_says_yes_or_no(self, policy: EvictionPolicy, position: int | None) -> None:
        assert isinstance(policy.may_drop(Facts("a"), position, OUTLOOK), bool)

    def test_what_nobody_needs_may_be_dropped(self, policy: EvictionPolicy) -> None:
        assert policy.may_drop(Facts("a"), None, OUTLOOK)

    @pytest.mark.parametrize("seed", range(3))
    def test_it_serves_a_cluster(self, policy: EvictionPolicy, seed: int) -> None:
        world = World(_setup(), Random(seed).randbytes(800), eviction=policy)
        run(world)
        assert not world.scheduler.snapshot()["policy_faults"]


class PrefetchContract:
    NEEDS = tuple(
        FetchNeed(
            turn_id=f"t{number}",
            chunk=f"k{number}",
            start=0,
            num_bytes=40,
            node_id="n1",
            source=Tier.SSD,
            source_node="n1",
        )
        for number in range(6)
    )

    @pytest.fixture
    def policy(self) -> PrefetchPolicy:
        raise NotImplementedError

    @pytest.mark.parametrize(
        "outlook",
        [
            OUTLOOK,
            replace(OUTLOOK, num_waiting=0, session_bytes=0.0),
            replace(OUTLOOK, dram_budget_bytes=0, ssd_budget_bytes=0),
        ],
    )
    def test_the_window_is_a_number_of_turns(self, policy: PrefetchPolicy, outlook: Outlook) -> None:
        assert isinstance(policy.window(outlook), int)
        assert policy.window(outlook) >= 0

    def test_it_chooses_among_the_needs(self, policy: PrefetchPolicy) -> None:
        chosen = list(policy.choose(self.NEEDS))
        assert set(chosen) <= set(self.NEEDS)
        assert len(set(chosen)) == len(chosen)
        assert list(policy.choose(self.NEEDS)) == chosen, "asking changes nothing"

    def test_no_needs_no_choice(self, policy: PrefetchPolicy) -> None:
        assert list(policy.choose(())) == []

    @pytest.mark.parametrize("seed", range(3))
    def test_it_serves_a_cluster(self, policy: PrefetchPolicy, seed: int) -> None:
        world = World(_setup(), Random(seed).randbytes(800), prefetch=policy)
        run(world)
        assert not world.scheduler.snapshot()["policy_faults"]


class PlacementContract:
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        raise NotImplementedError

    @pytest.mark.parametrize("seed", range(20))
    def test_it_chooses_one_that_was_offered(self, policy: PlacementPolicy, seed: int) -> None:
        random, turn = Random(seed), turn_of("a/1", text(1, 10))
        options = [draw_option(random, f"r{number}") for number in range(1 + seed % 5)]
        chosen = policy.choose(turn, options)
        assert chosen in {option.replica_id for option in options}
        assert policy.choose(turn, options) == chosen, "asking changes nothing"
        random.shuffle(options)
        assert policy.choose(turn, options) == chosen, "the order of the options is no argument"

    def test_an_idle_replica_is_better_than_a_busy_one(self, policy: PlacementPolicy) -> None:
        idle = draw_option(Random(0), "r1", num_running_turns=0, num_queued_tokens=0, num_running_tokens=0)
        busy = replace(idle, replica_id="r0", num_running_turns=3, num_queued_tokens=5000, num_running_tokens=5000)
        assert policy.choose(turn_of("a/1", text(1, 10)), [busy, idle]) == "r1"

    @pytest.mark.parametrize("seed", range(3))
    def test_it_serves_a_cluster(self, policy: PlacementPolicy, seed: int) -> None:
        world = World(_setup(), Random(seed).randbytes(800), placement=policy)
        run(world)
        assert not world.scheduler.snapshot()["policy_faults"]


class AdmissionContract:
    @pytest.fixture
    def policy(self) -> AdmissionPolicy:
        raise NotImplementedError

    @pytest.mark.parametrize("is_awaited", [False, True])
    @pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
    def test_it_says_yes_or_no(self, policy: AdmissionPolicy, is_awaited: bool, fill: float) -> None:
        offer = Offer(session_id="s", chunk=chunk_of(text(1, 4), 0), is_awaited=is_awaited, dram_fill=fill)
        assert isinstance(policy.admit(offer, OUTLOOK), bool)

    def test_what_a_waiting_turn_needs_is_saved_while_there_is_room(self, policy: AdmissionPolicy) -> None:
        offer = Offer(session_id="s", chunk=chunk_of(text(1, 4), 0), is_awaited=True, dram_fill=0.0)
        assert policy.admit(offer, OUTLOOK)

    @pytest.mark.parametrize("seed", range(3))
    def test_it_serves_a_cluster(self, policy: AdmissionPolicy, seed: int) -> None:
        world = World(_setup(), Random(seed).randbytes(800), admission=policy)
        run(world)
        assert not world.scheduler.snapshot()["policy_faults"]


def draw_option(random: Random, replica_id: str, **rest: int) -> ReplicaOption:
    num_reused = random.randrange(1000)
    option = ReplicaOption(
        replica_id=replica_id,
        node_id=f"n{random.randrange(3)}",
        num_running_turns=random.randrange(4),
        max_running_turns=4,
        num_running_tokens=random.randrange(5000),
        max_running_tokens=10000,
        num_queued_tokens=random.randrange(5000),
        prefill_tokens_per_s=1000.0,
        num_reused_tokens=num_reused,
        num_uncached_tokens=1000 - num_reused,
        load_s=random.random(),
    )
    return replace(option, **rest)  # type: ignore[arg-type]


def _setup() -> Setup:
    return Setup(config=SchedulerConfig(low_watermark=0.5, high_watermark=0.8), dram_bytes=200, ssd_bytes=300)
