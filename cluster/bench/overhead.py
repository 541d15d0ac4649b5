"""What the store costs traffic that never hits: tokens/s of the whole system with reuse on and off.

Scheduler, node store and one replica are brought up twice: with DRAM alone, which is what one gets unasked, and with an
SSD tier, to which every chunk is written through. Segments of single-turn conversations, all different, alternate
between reuse on (marks computed, chunks saved, evicted) and off. Nothing is ever found, so what differs is the price of
having a store. Before the next segment the store comes to rest: the throughput counts up to the last answer, the CPU
time of all processes up to that rest.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from actors.engine.params import SamplingParams
from actors.wire import TurnRequest
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.system import store_at_rest, vocab_size
from cluster.bringup import Running, running
from cluster.client import Answer
from cluster.config import Config, config_from

TARGET_RATIO = 0.98
PROMPT_TOKENS, NEW_TOKENS, NUM_CONVERSATIONS, CONCURRENCY = 256, 16, 8, 4
STORES = {"dram": "DRAM", "ssd": "DRAM, written through to SSD"}
QUICK_PROMPT_TOKENS, QUICK_NEW_TOKENS, QUICK_NUM_CONVERSATIONS = 96, 4, 3

LIMITS = (
    "Per chunk: a copy with checksum, Ray's copy into its store with a fixed price per object, three actor calls and a"
    " few scheduler events; per turn: hashing its marks. On a CPU the model's own cores do it; the share falls with the"
    " size of the model, on a GPU they are other cores.",
    "With an SSD every chunk is verified, written and synced as well: the kernel's time for it is CPU time here.",
)


def run(options: BenchOptions) -> Result:
    shape = (
        (QUICK_PROMPT_TOKENS, QUICK_NEW_TOKENS, QUICK_NUM_CONVERSATIONS)
        if options.quick
        else (PROMPT_TOKENS, NEW_TOKENS, NUM_CONVERSATIONS)
    )
    measured = {}
    with options.scratch_folder("overhead") as folder:
        for store, words in STORES.items():
            options.progress(f"{words}: bringing up the system")
            with running(_config(options, str(folder / "ssd") if store == "ssd" else None)) as cluster:
                segments = _Segments(cluster, *shape)
                pairs = asyncio.run(segments.alternate(options, words))
                measured[store] = Measured(pairs, segments.num_tokens, segments.num_reused, cluster.store_stats())
    return _result(options, shape, measured)


def _config(options: BenchOptions, ssd_url: str | None) -> Config:
    model = {
        "path": options.model,
        "dtype": options.computed_dtype,
        "device": options.computed_device,
        "num_threads": options.threads,
    }
    if options.quick:
        model |= {"chunk_tokens": 32}
    store = {"dram_bytes": "64MiB" if options.quick else "256MiB", "ssd_url": ssd_url, "ssd_bytes": "4GiB"}
    cluster = {"cpus_per_replica": 1, "gpus_per_replica": 1 if options.computed_device == "cuda" else 0}
    return config_from({"model": model, "store": store, "cluster": cluster})


@dataclass(frozen=True)
class Sample:
    """One segment: until its last answer, and the CPU time of all processes until the store rested."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Measured:
    """What one bring-up gave: pairs of segments, and what its store did meanwhile."""

    pairs: dict[str, list[Sample]]
    num_tokens: int
    """Of one segment, prompts and answers."""
    num_reused: int
    stores: Sequence[dict[str, Any]]

    def seconds(self, mode: str) -> list[float]:
        return [sample.seconds for sample in self.pairs[mode]]

    def cpu_s(self, mode: str) -> list[float]:
        return [sample.cpu_s for sample in self.pairs[mode]]

    def figures(self) -> dict[str, Any]:
        each = [off / on for off, on in zip(self.seconds("off"), self.seconds("on"))]  # of throughput, not of time
        low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return {
            "seconds": {mode: self.seconds(mode) for mode in self.pairs},
            "cpu_s": {mode: self.cpu_s(mode) for mode in self.pairs},
            "tokens_per_s": {mode: [self.num_tokens / s for s in self.seconds(mode)] for mode in self.pairs},
            "ratio": median(each),
            "ratio_low": low,
            "ratio_high": high,
            "undisturbed_ratio": min(self.seconds("off")) / min(self.seconds("on")),
            "cpu_ratio": median_ratio(self.cpu_s("on"), self.cpu_s("off")),
            "noise": median([abs(a / b - 1) for a, b in pairwise(self.seconds("off"))] or [0.0]),
            "saved_bytes": sum(store["saved_bytes"] for store in self.stores),
            "written_bytes": sum(sum(store["demoted_bytes"].values()) for store in self.stores),
            "reused_tokens": self.num_reused,
        }


class _Segments:
    """Batches of conversations of one turn, each of its own random tokens."""

    def __init__(self, cluster: Running, prompt_tokens: int, new_tokens: int, num_conversations: int) -> None:
        self.prompt_tokens, self.new_tokens, self.num_conversations = prompt_tokens, new_tokens, num_conversations
        self._cluster = cluster
        self._random = random.Random(0)
        self._numbers = count()
        self._vocabulary = vocab_size(cluster.config.model.path)
        self.num_reused = 0

    @property
    def num_tokens(self) -> int:
        return self.num_conversations * (self.prompt_tokens + self.new_tokens)

    async def alternate(self, options: BenchOptions, words: str) -> dict[str, list[Sample]]:
        """Segments with reuse off and on, in pairs, after one of each that does not count."""
        for reuse in (False, True):
            await self.once(reuse=reuse)
        samples: dict[str, list[Sample]] = {"off": [], "on": []}
        for pair in range(options.repeats):
            options.progress(f"{words}: pair {pair + 1} of {options.repeats}")
            for reuse in (False, True) if pair % 2 == 0 else (True, False):
                samples["on" if reuse else "off"].append(await self.once(reuse=reuse))
        return samples

    async def once(self, *, reuse: bool) -> Sample:
        requests = [self._request(reuse=reuse) for _ in range(self.num_conversations)]
        room = asyncio.Semaphore(CONCURRENCY)

        async def take(request: TurnRequest) -> Answer:
            async with room:
                return await self._cluster.client.run(request)

        cpu_began, began = cpu_seconds(), time.perf_counter()
        answers = await asyncio.gather(*map(take, requests))
        seconds = time.perf_counter() - began
        await store_at_rest(self._cluster)  # as long with reuse off
        self.num_reused += sum(sum(answer.account.reused.values()) for answer in answers)
        return Sample(seconds, cpu_seconds() - cpu_began)

    def _request(self, *, reuse: bool) -> TurnRequest:
        name = f"overhead-{next(self._numbers)}"
        return TurnRequest(
            turn_id=name,
            session_id=name,
            token_ids=tuple(self._random.randrange(self._vocabulary) for _ in range(self.prompt_tokens)),
            sampling=SamplingParams(max_new_tokens=self.new_tokens, ignore_eos=True),
            reuse=reuse,
        )


def cpu_seconds() -> float:
    """CPU time of this process and all that descend from it, Ray's own among them; of living ones."""
    times: dict[int, float] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        times[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(times.get(pid, 0.0) for pid in ours)


def _result(options: BenchOptions, shape: tuple[int, int, int], measured: dict[str, Measured]) -> Result:
    figures = {store: pairs.figures() for store, pairs in measured.items()}
    prompt_tokens, new_tokens, num_conversations = shape
    return Result(
        name="overhead",
        setup=options.setup(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            conversations=num_conversations,
            concurrency=CONCURRENCY,
        ),
        tables=[_throughput_table(figures), _store_table(figures)],
        figures=figures,
        targets=[
            Target(
                measure=f"throughput with a store / without, nothing reused, {STORES[store]}",
                comparison=">=",
                bound=TARGET_RATIO,
                value=entry["ratio"],
                note=f"two equal segments differ by {entry['noise']:.1%} here; the fastest of each "
                f"{entry['undisturbed_ratio']:.3f}, CPU time on / off {entry['cpu_ratio']:.3f}",
            )
            for store, entry in figures.items()
        ],
        limits=LIMITS,
    )


def _throughput_table(figures: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            STORES[store],
            *(f"{median(entry['tokens_per_s'][mode]):.0f}" for mode in ("off", "on")),
            f"{entry['ratio']:.3f}",
            f"{entry['ratio_low']:.3f} – {entry['ratio_high']:.3f}",
            f"{entry['noise']:.1%}",
            f"{entry['undisturbed_ratio']:.3f}",
            f"{entry['cpu_ratio']:.3f}",
        ]
        for store, entry in figures.items()
    ]
    columns = ["store", "off, tokens/s", "on, tokens/s", "on / off", "middle half", "off / off", "fastest", "CPU time"]
    return Table(title="Throughput of conversations that never come back", columns=columns, rows=rows)


def _store_table(figures: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            STORES[store],
            f"{entry['saved_bytes'] / 2**20:.0f}",
            f"{entry['written_bytes'] / 2**20:.0f}",
            entry["reused_tokens"],
        ]
        for store, entry in figures.items()
    ]
    columns = ["store", "saved, MiB", "written to SSD, MiB", "tokens reused"]
    return Table(title="What it did meanwhile", columns=columns, rows=rows)
