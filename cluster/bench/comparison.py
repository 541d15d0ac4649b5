"""Two passes over the same turns, without reuse and with it: times, rates and ratios, and what is saved.

Knows no system and no machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from cluster.bench.replay import Pass, PlayedTurn
from cluster.report import quantile

DRAM_PRICE, SSD_PRICE, GPU_PRICE = 0.0088, 0.000082, 5.0  # dollars an hour: a GB, a GB, a GPU; of the paper
PAPER_DRAM_GB, PAPER_SSD_GB = 128.0, 10_000.0


def saving(speed_up: float, dram_gb: float, ssd_gb: float, num_gpus: int = 1) -> float:
    """The paper's share of cost saved: less GPU time, but storage to pay for as long as the GPUs."""
    storage = DRAM_PRICE * dram_gb + SSD_PRICE * ssd_gb
    return 1 - (1 + storage / (GPU_PRICE * num_gpus)) / speed_up


class Comparison:
    """The counted turns, off and on."""

    def __init__(self, off: Pass, on: Pass) -> None:
        self.off, self.on = off, on
        self.prompt_tokens = sum(turn.prompt_tokens for turn in on.turns)
        self.output_tokens = sum(len(turn.answer) for turn in on.turns)

    @property
    def num_differing(self) -> int:
        """Turns whose answers are not the same tokens."""
        theirs = {turn.key: turn.answer for turn in self.on.turns}
        return sum(theirs.get(turn.key) != turn.answer for turn in self.off.turns)

    def reduction(self, of: Callable[[PlayedTurn], float], by: Callable[[list[float]], float]) -> float:
        return 1 - by([of(turn) for turn in self.on.turns]) / by([of(turn) for turn in self.off.turns])

    def prefill_rate(self, one: Pass) -> float:
        """Prompt tokens served for each second of prefill."""
        return self.prompt_tokens / one.engine["prefill_s"]

    @property
    def prefill_ratio(self) -> float:
        return self.prefill_rate(self.on) / self.prefill_rate(self.off)

    @property
    def busy_ratio(self) -> float:
        return self.off.busy_s / self.on.busy_s

    @property
    def cpu_ratio(self) -> float | None:
        """CPU time of the engines' processes, off / on: saving and loading are in it, other programs are not."""
        return self.off.engine["cpu_s"] / self.on.engine["cpu_s"] if self.on.engine["cpu_s"] else None

    @property
    def prefill_share(self) -> float:
        """Of the busy time without reuse."""
        return self.off.engine["prefill_s"] / self.off.busy_s

    @property
    def busy_bound(self) -> float:
        """The busy-time ratio if prefill took no time at all with reuse."""
        return self.off.busy_s / self.on.engine["decode_s"]

    @property
    def decode_ratio(self) -> float:
        """Seconds of decoding, on / off; of the same tokens."""
        return self.on.engine["decode_s"] / self.off.engine["decode_s"]

    @property
    def reused(self) -> Counter[str]:
        return _sum(turn.reused for turn in self.on.turns)

    @property
    def recomputed(self) -> Counter[str]:
        return _sum(turn.recomputed for turn in self.on.turns)

    @property
    def hit_rate(self) -> float:
        return self.reused.total() / self.prompt_tokens

    @property
    def ideal_hit_rate(self) -> float:
        """Of a store that never misses: what is new, or moved by a truncation, is computed all the same."""
        return sum(turn.repeated_tokens for turn in self.on.turns) / self.prompt_tokens

    def whole(self) -> Comparison:
        """Without the turns that were truncated; times only, the engine's seconds are of all turns."""
        off = replace(self.off, turns=[turn for turn in self.off.turns if not turn.truncated])
        on = replace(self.on, turns=[turn for turn in self.on.turns if not turn.truncated])
        return Comparison(off, on)


def prefill_ttft(turn: PlayedTurn) -> float:
    return turn.prefill_ttft_s


def whole_ttft(turn: PlayedTurn) -> float:
    return turn.ttft_s


TTFTS = {"ttft": prefill_ttft, "ttft_with_queue": whole_ttft}


def p50(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5) or 0.0


def p95(samples: Sequence[float]) -> float:
    return quantile(samples, 0.95) or 0.0


MIDDLES: dict[str, Callable[[list[float]], float]] = {"p50": p50, "p95": p95, "mean": mean}


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def _summary(turns: Sequence[PlayedTurn]) -> dict[str, dict[str, float]]:
    return {
        name: {kind: middle([ttft(turn) for turn in turns]) for kind, middle in MIDDLES.items()}
        for name, ttft in TTFTS.items()
    }


def _by_turn(turns: Sequence[PlayedTurn]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for turn in sorted(turns, key=lambda turn: turn.turn):
        found.setdefault(turn.turn + 1, []).append(turn.prefill_ttft_s)
    return found


def _pass_figures(one: Pass, prefill_rate: float) -> dict[str, Any]:
    return {
        **_summary(one.turns),
        "wall_s": one.wall_s,
        "busy_s": one.busy_s,
        **one.engine,
        "prompt_tokens_per_prefill_s": prefill_rate,
        "prefill_s_per_token": one.engine["prefill_s"] / max(1, one.engine["prefill_tokens"]),
        "decode_s_per_token": one.engine["decode_s"] / max(1, one.engine["decode_tokens"]),
        "tokens_per_step": (one.engine["prefill_tokens"] + one.engine["decode_tokens"]) / max(1, one.engine["steps"]),
        "first_turn_ttft_s": mean(turn.prefill_ttft_s for turn in one.turns if turn.turn == 0),
        "later_turns_ttft_s": mean([turn.prefill_ttft_s for turn in one.turns if turn.turn] or [0.0]),
        "attempts": sum(turn.attempts for turn in one.turns),
        "ttft_samples_s": [round(turn.prefill_ttft_s, 4) for turn in one.turns],
    }


def figures(made: Comparison, dram_gb: float, ssd_gb: float) -> dict[str, Any]:
    by_turn = {"off": _by_turn(made.off.turns), "on": _by_turn(made.on.turns)}
    return {
        "off": _pass_figures(made.off, made.prefill_rate(made.off)),
        "on": _pass_figures(made.on, made.prefill_rate(made.on)),
        "num_turns": len(made.on.turns),
        "prompt_tokens": made.prompt_tokens,
        "output_tokens": made.output_tokens,
        "num_truncated": sum(turn.truncated for turn in made.on.turns),
        "num_differing_answers": made.num_differing,
        "ttft_reduction": {kind: made.reduction(prefill_ttft, middle) for kind, middle in MIDDLES.items()},
        "ttft_with_queue_reduction": {kind: made.reduction(whole_ttft, middle) for kind, middle in MIDDLES.items()},
        "ttft_reduction_not_truncated": made.whole().reduction(prefill_ttft, mean),
        "prefill_ratio": made.prefill_ratio,
        "busy_ratio": made.busy_ratio,
        "cpu_ratio": made.cpu_ratio,
        "busy_ratio_if_prefill_were_free": made.busy_bound,
        "prefill_share_off": made.prefill_share,
        "decode_ratio": made.decode_ratio,
        "hit_rate": made.hit_rate,
        "ideal_hit_rate": made.ideal_hit_rate,
        "hit_rate_by_tier": {tier: count / made.prompt_tokens for tier, count in made.reused.items()},
        "recomputed_by_cause": {cause: count / made.prompt_tokens for cause, count in made.recomputed.items()},
        "dram_gb": dram_gb,
        "ssd_gb": ssd_gb,
        "cost_saving": saving(made.busy_ratio, dram_gb, ssd_gb),
        "cost_saving_with_the_papers_storage": saving(made.busy_ratio, PAPER_DRAM_GB, PAPER_SSD_GB),
        "ttft_by_turn": [
            {"turn": turn, "count": len(on), "off_s": mean(by_turn["off"][turn]), "on_s": mean(on)}
            for turn, on in by_turn["on"].items()
        ],
    }
