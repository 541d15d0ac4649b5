"""Plays conversations of given lengths through a running system: random messages, the model's own greedy answers.

The same conversations get the same messages in every pass, with reuse or without. What a turn takes is read on the
client's clock, what the engine takes from its own meter.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.engine.params import SamplingParams
from actors.wire import TurnRequest
from cluster.bench.sharegpt import Shape, TurnShape, num_dropped
from cluster.bench.system import store_at_rest
from cluster.bringup import Running
from cluster.client import Answer

TELL_EVERY = 20
METER_TOTALS = ("steps", "prefill_tokens", "decode_tokens", "prefill_s", "decode_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedTurn:
    """One turn as it went."""

    conversation: int
    turn: int
    prompt_tokens: int
    repeated_tokens: int
    """Of the prompt, those that were computed for the turn before, from token 0 on: what an ideal store gives back."""
    truncated: bool
    answer: tuple[int, ...]
    reused: Mapping[str, int]
    """By tier."""
    recomputed: Mapping[str, int]
    """By cause."""
    ttft_s: float
    queue_s: float
    """Of it, in the scheduler's queue."""
    attempts: int

    @property
    def key(self) -> tuple[int, int]:
        return self.conversation, self.turn

    @property
    def prefill_ttft_s(self) -> float:
        """Without queueing."""
        return self.ttft_s - self.queue_s


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All conversations, once."""

    turns: Sequence[PlayedTurn]
    wall_s: float
    engine: Mapping[str, float]
    """What the engines' totals grew by: METER_TOTALS, and `cpu_s` of their processes until the store rested."""

    @property
    def busy_s(self) -> float:
        """Seconds in engine steps: the GPU time of the paper."""
        return self.engine["prefill_s"] + self.engine["decode_s"]


class Replay:
    """Numbered conversations against one running system."""

    def __init__(
        self, cluster: Running, window: int, vocab_size: int, concurrency: int, progress: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._window = window
        self._vocab_size = vocab_size
        self._concurrency = concurrency
        self._progress = progress

    async def play(self, shapes: Mapping[int, Shape], *, reuse: bool, what: str) -> Pass:
        """`concurrency` conversations at a time, in the order given, each turn as soon as the one before is answered.

        Returns when the store has come to rest. Raises TurnFailed.
        """
        turns: list[PlayedTurn] = []
        room = asyncio.Semaphore(self._concurrency)
        num_turns = sum(map(len, shapes.values()))

        async def play_one(number: int, shape: Shape) -> None:
            async with room:
                conversation = _Conversation(number, what, self._window, self._vocab_size, reuse)
                for turn in shape:
                    request = conversation.ask(turn)
                    answer = await self._cluster.client.run(request)
                    turns.append(conversation.answered(answer))
                    if len(turns) % TELL_EVERY == 0:
                        self._progress(f"{what}, turn {len(turns)} of {num_turns}")

        before, began = self._engine_totals(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, shape in shapes.items():
                group.create_task(play_one(number, shape))
        wall_s = time.perf_counter() - began
        await store_at_rest(self._cluster)
        after = self._engine_totals()
        grown = {name: after[name] - before[name] for name in after}
        return Pass(turns=sorted(turns, key=lambda turn: turn.key), wall_s=wall_s, engine=grown)

    def _engine_totals(self) -> dict[str, float]:
        stats = self._cluster.replica_stats()
        totals = {name: float(sum(replica[name] for replica in stats)) for name in METER_TOTALS}
        return {**totals, "cpu_s": sum(_cpu_seconds(replica["pid"]) for replica in stats)}


class _Conversation:
    """The history of one conversation as token ids, cut where the window is full."""

    def __init__(self, number: int, what: str, window: int, vocab_size: int, reuse: bool) -> None:
        self._number = number
        self._name = f"{what}/{number}"
        self._window = window
        self._vocab_size = vocab_size
        self._reuse = reuse
        self._random = random.Random(number)
        self._history: tuple[int, ...] = ()
        self._turn = -1
        self._num_dropped = 0
        self._request: TurnRequest | None = None

    def ask(self, turn: TurnShape) -> TurnRequest:
        self._turn += 1
        self._num_dropped = num_dropped(len(self._history), turn, self._window)
        self._history = self._history[self._num_dropped :]
        message = tuple(self._random.randrange(self._vocab_size) for _ in range(turn.new_tokens))
        self._request = TurnRequest(
            turn_id=f"{self._name}#{self._turn}",
            session_id=self._name,
            token_ids=self._history + message,
            sampling=SamplingParams(max_new_tokens=turn.output_tokens, ignore_eos=True),
            cuts=(self._num_computed,) if self._num_computed else (),
            reuse=self._reuse,
        )
        return self._request

    def answered(self, answer: Answer) -> PlayedTurn:
        assert self._request is not None
        assert answer.ttft_s is not None
        prompt, num_repeated = self._request.token_ids, self._num_computed
        self._history = prompt + answer.token_ids
        return PlayedTurn(
            conversation=self._number,
            turn=self._turn,
            prompt_tokens=len(prompt),
            repeated_tokens=num_repeated,
            truncated=self._num_dropped > 0,
            answer=answer.token_ids,
            reused={str(tier): count for tier, count in answer.account.reused.items()},
            recomputed={str(cause): count for cause, count in answer.account.recomputed.items()},
            ttft_s=answer.ttft_s,
            queue_s=answer.queue_wait_s,
            attempts=answer.num_attempts,
        )

    @property
    def _num_computed(self) -> int:
        """Tokens at the beginning of the next prompt whose KV was computed: all of the history but the last answer's
        last token, none after a truncation."""
        return max(0, len(self._history) - 1) if not self._num_dropped else 0


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process of this machine; 0 for one elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
