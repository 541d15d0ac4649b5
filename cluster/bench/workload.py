"""What reuse is worth for chat as it is: ShareGPT's shape through the whole system, with reuse on and off.

    beginnings of the warm-up conversations (on) -> the counted ones, off -> the same, on

The set-up of CachedAttention (USENIX ATC '24), section 4: more conversations at a time than run, no think time, a
window of which half is kept when it overflows, an HBM pool smaller than what is under way, so that most of what comes
back comes from DRAM. On a CPU all lengths are scaled, the window's with them. Long conversations start first: with so
few, those that start late would run alone in the end and nothing would be batched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter

from cluster.bench.comparison import Comparison, figures
from cluster.bench.options import BenchOptions
from cluster.bench.replay import Pass, Replay
from cluster.bench.result import Result, Table, Target
from cluster.bench.sharegpt import Conversations, Shape, conversations
from cluster.bench.system import vocab_size
from cluster.bringup import running
from cluster.config import Config, config_from

DATA = Path("../shared/data/traces")
TARGET_TTFT, TARGET_PREFILL, TARGET_BUSY, TARGET_COST = 0.90, 8.0, 3.5, 0.70
PAPER_PREFILL_SHARE = 0.88  # of its baseline's GPU time: what its 6.8 times the prefill and 4.0 times the whole imply
WARM_UP_TURNS = 3
TURN_GROUPS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 9), (10, 19), (20, 99))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of the workload, and the system's sizes for it."""

    num_counted: int
    num_warm_up: int
    """Conversations, of which WARM_UP_TURNS turns each."""
    scale: float
    concurrency: int
    max_running_turns: int
    kv_tokens: int
    dram: str
    ssd: str
    chunk_tokens: int = 128


CPU = Sizes(
    num_counted=32,
    num_warm_up=16,
    scale=0.25,
    concurrency=24,
    max_running_turns=16,
    kv_tokens=5120,
    dram="192MiB",
    ssd="4GiB",
)
CUDA = Sizes(
    num_counted=400,
    num_warm_up=100,
    scale=1.0,
    concurrency=64,
    max_running_turns=24,
    kv_tokens=65_536,
    dram="4GiB",
    ssd="64GiB",
)
QUICK = Sizes(
    num_counted=6,
    num_warm_up=2,
    scale=0.05,
    concurrency=4,
    max_running_turns=3,
    kv_tokens=1024,
    dram="16MiB",
    ssd="256MiB",
    chunk_tokens=32,
)


def run(options: BenchOptions) -> Result:
    sizes = QUICK if options.quick else CUDA if options.computed_device == "cuda" else CPU
    folder = Path(options.data) if options.data else DATA
    source = conversations(folder, sizes.num_counted + sizes.num_warm_up)
    options.progress("bringing up the system")
    with options.scratch_folder("workload") as scratch, running(_config(options, sizes, scratch)) as cluster:
        scaled = source.scaled(sizes.scale, cluster.model.max_turn_tokens)
        replay = Replay(cluster, scaled.window, vocab_size(options.model), sizes.concurrency, options.progress)
        off, on = asyncio.run(_play(replay, scaled.shapes, sizes))
        stores = cluster.store_stats()
    return _result(options, sizes, scaled, Comparison(off, on), stores)


async def _play(replay: Replay, shapes: Sequence[Shape], sizes: Sizes) -> tuple[Pass, Pass]:
    numbered = list(enumerate(shapes))
    warm_up = {number: shape[:WARM_UP_TURNS] for number, shape in numbered[: sizes.num_warm_up]}
    counted = _longest_first(numbered[sizes.num_warm_up :])
    await replay.play(warm_up, reuse=True, what="warm-up")
    off = await replay.play(counted, reuse=False, what="off")
    on = await replay.play(counted, reuse=True, what="on")
    return off, on


def _longest_first(numbered: Sequence[tuple[int, Shape]]) -> dict[int, Shape]:
    return dict(sorted(numbered, key=lambda each: -sum(turn.output_tokens for turn in each[1])))


def _config(options: BenchOptions, sizes: Sizes, folder: Path) -> Config:
    model = {
        "path": options.model,
        "dtype": options.computed_dtype,
        "device": options.computed_device,
        "num_threads": options.threads,
        "kv_tokens": sizes.kv_tokens,
        "chunk_tokens": sizes.chunk_tokens,
        "max_running_turns": sizes.max_running_turns,
    }
    store = {"dram_bytes": sizes.dram, "ssd_url": str(folder / "ssd"), "ssd_bytes": sizes.ssd}
    cluster = {"cpus_per_replica": 1, "gpus_per_replica": 1 if options.computed_device == "cuda" else 0}
    return config_from({"model": model, "store": store, "cluster": cluster})


# --- the result -------------------------------------------------------------------------------------------------------


def _result(
    options: BenchOptions,
    sizes: Sizes,
    scaled: Conversations,
    made: Comparison,
    stores: Sequence[Mapping[str, Any]],
) -> Result:
    found = figures(made, _gigabytes(sizes.dram), _gigabytes(sizes.ssd))
    found["saved_bytes"] = sum(store["saved_bytes"] for store in stores)
    return Result(
        name="workload",
        setup=_setup(options, sizes, scaled, made),
        tables=[_sides(found), _sources(found), _turns(found["ttft_by_turn"])],
        figures=found,
        targets=_targets(found),
        limits=_limits(found, made, sizes),
    )


def _gigabytes(size: str) -> float:
    return TypeAdapter(ByteSize).validate_python(size) / 1e9


def _setup(options: BenchOptions, sizes: Sizes, scaled: Conversations, made: Comparison) -> dict[str, Any]:
    num_counted = len(scaled.shapes) - sizes.num_warm_up
    return options.setup(
        repeats=1,
        source=scaled.source,
        scale=f"{sizes.scale:g} of all lengths and of the window",
        window=scaled.window,
        conversations=num_counted,
        warm_up=f"the first {WARM_UP_TURNS} turns of {sizes.num_warm_up} other conversations",
        turns=len(made.on.turns),
        mean_turns=len(made.on.turns) / num_counted,
        mean_prompt_tokens=made.prompt_tokens / len(made.on.turns),
        mean_output_tokens=made.output_tokens / len(made.on.turns),
        think_time_s=0,
        conversations_at_a_time=sizes.concurrency,
        max_running_turns=sizes.max_running_turns,
        kv_tokens=sizes.kv_tokens,
        chunk_tokens=sizes.chunk_tokens,
        dram=sizes.dram,
        ssd=sizes.ssd,
        order="one pass off, then one on, longest conversations first",
    )


def _sides(found: Mapping[str, Any]) -> Table:
    off, on = found["off"], found["on"]
    rows: list[list[str]] = []
    for name, words in (("ttft", "TTFT without queueing"), ("ttft_with_queue", "TTFT with queueing")):
        rows += [
            [f"{words}, {kind}, s", f"{off[name][kind]:.3f}", f"{on[name][kind]:.3f}", f"−{reduction:.1%}"]
            for kind, reduction in found[f"{name}_reduction"].items()
        ]
    for name, words, form in (
        ("prompt_tokens_per_prefill_s", "prompt tokens for a second of prefill", ".0f"),
        ("busy_s", "engine busy, s", ".1f"),
        ("prefill_s", "  of it prefill, s", ".1f"),
        ("decode_s", "  of it decode, s", ".1f"),
        ("cpu_s", "engine process, CPU time, s", ".1f"),
        ("wall_s", "first turn to last, s", ".1f"),
    ):
        ratio = on[name] / off[name] if name.startswith("prompt") else off[name] / max(1e-9, on[name])
        rows.append([words, format(off[name], form), format(on[name], form), f"{ratio:.2f}×"])
    return Table(title=f"{found['num_turns']} turns", columns=["", "reuse off", "reuse on", "gain"], rows=rows)


def _sources(found: Mapping[str, Any]) -> Table:
    rows = [[f"from {tier}", f"{share:.1%}"] for tier, share in found["hit_rate_by_tier"].items()]
    rows += [[f"computed: {cause}", f"{share:.1%}"] for cause, share in found["recomputed_by_cause"].items()]
    rows.append(["a store that never misses", f"{found['ideal_hit_rate']:.1%}"])
    return Table(title="Where the prompts' KV came from, reuse on", columns=["", "share of tokens"], rows=rows)


def _turns(by_turn: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for low, high in TURN_GROUPS:
        group = [each for each in by_turn if low <= each["turn"] <= high]
        count = sum(each["count"] for each in group)
        if count:
            off, on = (sum(each[side] * each["count"] for each in group) / count for side in ("off_s", "on_s"))
            name = f"{low}" if low == high else f"{low}–{min(high, group[-1]['turn'])}"
            rows.append([name, count, f"{off:.3f}", f"{on:.3f}"])
    columns = ["turn", "turns", "reuse off, s", "reuse on, s"]
    return Table(title="Mean TTFT without queueing by turn", columns=columns, rows=rows)


def _targets(found: Mapping[str, Any]) -> list[Target]:
    with_queue = found["ttft_with_queue_reduction"]["mean"]
    whole = found["ttft_reduction_not_truncated"]
    return [
        Target(
            measure="reduction of the mean TTFT, without queueing",
            comparison=">=",
            bound=TARGET_TTFT,
            value=found["ttft_reduction"]["mean"],
            note=f"p50 {found['ttft_reduction']['p50']:.1%}; with queueing {with_queue:.1%}; "
            f"turns that were not truncated {whole:.1%}",
        ),
        Target(
            measure="prefill throughput, on / off",
            comparison=">=",
            bound=TARGET_PREFILL,
            value=found["prefill_ratio"],
        ),
        Target(
            measure="busy time, off / on",
            comparison=">=",
            bound=TARGET_BUSY,
            value=found["busy_ratio"],
            note=f"{found['busy_ratio_if_prefill_were_free']:.2f} if prefill took no time; CPU time of the whole "
            f"process {found['cpu_ratio'] or 0:.2f}",
        ),
        Target(
            measure="cost saving by the paper's formula",
            comparison=">=",
            bound=TARGET_COST,
            value=found["cost_saving"],
            note=f"1 GPU, {found['dram_gb']:.2f} GB DRAM, {found['ssd_gb']:.1f} GB SSD; with the paper's 128 GB and "
            f"10 TB {found['cost_saving_with_the_papers_storage']:.1%}",
        ),
    ]


def _limits(found: Mapping[str, Any], made: Comparison, sizes: Sizes) -> list[str]:
    """What keeps each figure from being better, with figures."""
    off, on = found["off"], found["on"]
    step_s = on["busy_s"] / max(1, on["steps"])
    return [
        f"Hits: {found['ideal_hit_rate']:.1%} of the prompt tokens were computed for the turn before; the rest is new, "
        f"or was moved by a truncation ({found['num_truncated']} turns: keys are chains of prefixes, a cut prompt is a "
        f"miss). {found['hit_rate']:.1%} were reused. A token of prefill costing the same, prefill throughput could be "
        f"{1 / (1 - found['hit_rate']):.1f} times as high; but a token costs "
        f"{on['prefill_s_per_token'] / off['prefill_s_per_token']:.1f} times as much, as there are fewer in a step to "
        f"share it ({on['tokens_per_step']:.0f} tokens of prefill and decode, {off['tokens_per_step']:.0f} without).",
        "TTFT: a turn waits for the step under way and is computed with the next, however little there is to compute. "
        f"A step takes {1e3 * step_s:.0f} ms here with "
        f"{on['decode_tokens'] / max(1, on['steps']):.0f} turns decoding; later turns take "
        f"{1e3 * on['later_turns_ttft_s']:.0f} ms ({on['later_turns_ttft_s'] / step_s:.1f} steps), first ones "
        f"{1e3 * on['first_turn_ttft_s']:.0f}. What is beyond two steps was not taken apart: restoring, "
        f"prefills of others, calls between processes that share the engine's cores. Lengths of {sizes.scale:g} of the "
        f"real ones shorten what reuse saves, but not this.",
        f"Busy time: decoding takes {1 - found['prefill_share_off']:.0%} of it without reuse (in the paper about "
        f"{1 - PAPER_PREFILL_SHARE:.0%}, by its own ratios) and all the more with it: tokens of a decode ride along "
        f"for little in a step of prefill, and there are fewer of those. A decoded token costs "
        f"{on['decode_s_per_token'] / off['prefill_s_per_token']:.1f} times a prefilled one; for {TARGET_BUSY:g} times "
        f"the busy time it must not cost more than {_affordable(found, made):.1f}.",
        "On a GPU a step is far shorter than the prefill of a history, which the TTFT gains from; decoding is bound by "
        "reading weights and KV, and gains from batches of hundreds, not of two dozens. Neither was measured here.",
        f"The passes ran one after the other: other work on the machine hits one of them alone. Decoding the same "
        f"tokens took {found['decode_ratio']:.2f} times as long with reuse; fewer of them ride along, and saving and "
        f"loading share the cores. CPU time is disturbed less.",
        "Cost follows the busy time. The tiers are as small as the scaled workload, so their price hardly counts; the "
        "note has it with the paper's.",
    ]


def _affordable(found: Mapping[str, Any], made: Comparison) -> float:
    """How many times a prefilled token a decoded one may cost, for the target of the busy time at this prefill ratio.

    From (p·I + d·O) / (p·I/r + d·O) = target, for d/p.
    """
    inputs_per_output = made.prompt_tokens / made.output_tokens
    return max(0.0, inputs_per_output * (1 - TARGET_BUSY / found["prefill_ratio"]) / (TARGET_BUSY - 1))
