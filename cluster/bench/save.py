"""What saving costs a step, and how much memory it holds.

Two engines on one model do the same turns, one saves, the other does not, and they take turns every few steps, so that
what else the machine does hits both alike. A second thread takes the chunks as a shard's exports would, and copies them
as Ray would. Whatever of encoding and taking is not done when the other engine's turn comes is waited for, and counts.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from actors.engine.engine import Engine
from actors.engine.loading import LoadedModel
from actors.engine.turns import EngineConfig
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.sides import Load, Sample, Side, prompts, running_side

TARGET_RATIO = 1.02
KV_TOKENS, CHUNK_TOKENS, STEP_TOKENS = 8192, 128, 512
TINY_BUFFER_CHUNKS = 4

# A decode of 64 steps fills a chunk in the middle of a block: it is encoded and taken while decoding goes on.
LOADS = (
    Load(name="prefill", words="prefill, 2,048 tokens", batch=1, prompt_tokens=2048, new_tokens=1, block_steps=2),
    Load(name="decode_1", words="decode, 64 steps, batch 1", batch=1, prompt_tokens=92, new_tokens=66, block_steps=8),
    Load(name="decode_8", words="decode, 64 steps, batch 8", batch=8, prompt_tokens=92, new_tokens=66, block_steps=8),
)
QUICK_LOADS = (
    Load(name="prefill", words="prefill, 256 tokens", batch=1, prompt_tokens=256, new_tokens=1, block_steps=2),
    Load(name="decode_1", words="decode, 8 steps, batch 1", batch=1, prompt_tokens=28, new_tokens=10, block_steps=4),
    Load(name="decode_8", words="decode, 8 steps, batch 8", batch=8, prompt_tokens=28, new_tokens=10, block_steps=4),
)

Samples = dict[str, list[Sample]]
"""Of "on" and "off", in pairs."""

LIMITS = (
    "A step with saving scatters the raw keys of each layer into the write buffer and finds their rows; values stay"
    " where they are.",
    "A full chunk is copied and checksummed by the saver's thread and copied once more by its export: on a GPU that is"
    " nobody's time, on a CPU the model's own cores do it.",
    "Where other work shares the cores, two equal turns differ by more than saving costs: see the fastest blocks, and"
    " the CPU time of all threads, which neighbours change less.",
)


def run(options: BenchOptions) -> Result:
    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device=options.computed_device)
    chunk_tokens, step_tokens, loads = (32, 64, QUICK_LOADS) if options.quick else (CHUNK_TOKENS, STEP_TOKENS, LOADS)
    config = EngineConfig(
        model=options.model,
        kv_tokens=KV_TOKENS,
        chunk_tokens=chunk_tokens,
        max_step_tokens=step_tokens,
        num_threads=options.threads,
    )
    samples: dict[str, Samples] = {}
    with running_side(Engine(config, loaded), save=True) as on, running_side(Engine(config, loaded), save=False) as off:
        for load in loads:
            options.progress(load.words)
            samples[load.name] = alternate(load, on, off, options.repeats)
    options.progress("nobody takes the chunks")
    tiny = replace(config, write_buffer_chunks=TINY_BUFFER_CHUNKS, max_ready_chunks=TINY_BUFFER_CHUNKS)
    with running_side(Engine(tiny, loaded), save=True, takes=False) as untaken:
        untaken.begin(loads[0], prompts(loads[0], loaded.vocab_size, random.Random(0)))
        while untaken.engine.has_work:
            untaken.run_block(loads[0])
    return _result(options, loads, samples, on, untaken)


def alternate(load: Load, on: Side, off: Side, repeats: int) -> Samples:
    """Pairs of runs, block by block in turns, after one pair that does not count."""
    chance = random.Random(load.name)
    samples: Samples = {"on": [], "off": []}
    order = [on, off]
    for pair in range(repeats + 1):
        texts = prompts(load, on.engine.loaded.vocab_size, chance)
        for side in order:
            side.begin(load, texts)
        while on.engine.has_work or off.engine.has_work:
            for side in order:
                side.run_block(load)
            order.reverse()
        if pair:
            samples["on"].append(on.sample)
            samples["off"].append(off.sample)
    return samples


# --- what came out ----------------------------------------------------------------------------------------------------


def _result(
    options: BenchOptions,
    loads: tuple[Load, ...],
    samples: dict[str, Samples],
    taken: Side,
    untaken: Side,
) -> Result:
    ratios = {load.name: _ratios(samples[load.name]) for load in loads}
    memory = {"taken": _memory(taken), "untaken": _memory(untaken)}
    return Result(
        name="save",
        setup=options.setup(
            chunk_tokens=taken.engine.config.chunk_tokens,
            max_step_tokens=taken.engine.config.max_step_tokens,
            chunk_bytes=taken.engine.config.chunk_tokens * taken.engine.loaded.kv_bytes_per_token,
        ),
        tables=[_steps_table(loads, samples, ratios), _memory_table(memory)],
        figures={
            **{what: _column(samples, what) for what in ("steps_s", "blocks_s", "cpu_s")},
            "ratios": ratios,
            "memory": memory,
        },
        targets=[
            *(
                Target(
                    measure=f"step time with saving / without, {load.words}",
                    comparison="<=",
                    bound=TARGET_RATIO,
                    value=ratios[load.name]["on_off"],
                    note=_note(ratios[load.name]),
                )
                for load in loads
            ),
            *(
                Target(
                    measure=f"memory of saving / configured buffers, chunks {how}",
                    comparison="<=",
                    bound=1,
                    value=entry["share"],
                )
                for how, entry in memory.items()
            ),
        ],
        limits=LIMITS,
    )


def _note(ratio: dict[str, float]) -> str:
    return (
        f"equal turns differ by {ratio['noise']:.1%} here; fastest of each block {ratio['undisturbed']:.3f}, "
        f"CPU time {ratio['cpu']:.3f}"
    )


def _column(samples: dict[str, Samples], what: str) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {mode: [getattr(sample, what) for sample in runs] for mode, runs in both.items()}
        for name, both in samples.items()
    }


def _ratios(both: Samples) -> dict[str, float]:
    on, off = both["on"], both["off"]
    steps_on, steps_off = [s.steps_s for s in on], [s.steps_s for s in off]
    each = [a / b for a, b in zip(steps_on, steps_off)]
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each * 3)
    noise = [abs(a / b - 1) for a, b in pairwise(steps_off)] or [0.0]
    return {
        "on_off": median_ratio(steps_on, steps_off),
        "on_off_low": low,
        "on_off_high": high,
        "undisturbed": _undisturbed(on) / _undisturbed(off),
        "cpu": median_ratio([s.cpu_s for s in on], [s.cpu_s for s in off]),
        "noise": median(noise),
    }


def _undisturbed(runs: list[Sample]) -> float:
    """The sum of the fastest of each block: what neighbours on the machine add is in none of them."""
    return sum(map(min, zip(*(run.blocks_s for run in runs))))


def _memory(side: Side) -> dict[str, Any]:
    """Bytes at the peak and as configured: raw keys in slots, and encoded chunks on offer."""
    config, loaded, stats = side.engine.config, side.engine.loaded, side.engine.stats()
    item = loaded.torch_dtype.itemsize
    slot_bytes = config.chunk_tokens * sum(shape.num_kv_heads * shape.k_dim for shape in loaded.layers) * item
    chunk_bytes = config.chunk_tokens * loaded.kv_bytes_per_token
    configured = config.write_buffer_chunks * slot_bytes + config.max_ready_chunks * _with_head(chunk_bytes)
    peak = side.peak_slots * slot_bytes + side.peak_ready_bytes
    return {
        "slots": config.write_buffer_chunks,
        "peak_slots": side.peak_slots,
        "max_ready_chunks": config.max_ready_chunks,
        "peak_ready_bytes": side.peak_ready_bytes,
        "configured_bytes": configured,
        "peak_bytes": peak,
        "share": peak / configured,
        "chunks_dropped": int(stats["ready_dropped"]),
        "turns_not_saved": int(stats["turns_not_saved"]),
    }


def _with_head(chunk_bytes: int) -> int:
    """Framing, token ids and marks: a few bytes a token."""
    return chunk_bytes + max(16_384, chunk_bytes // 64)


def _steps_table(loads: tuple[Load, ...], samples: dict[str, Samples], ratios: dict[str, dict[str, float]]) -> Table:
    rows = []
    for load in loads:
        off, on = (median(s.steps_s for s in samples[load.name][mode]) * 1e3 for mode in ("off", "on"))
        ratio = ratios[load.name]
        spread = f"{ratio['on_off_low']:.3f} – {ratio['on_off_high']:.3f}"
        numbers = [f"{off:.0f}", f"{on:.0f}", f"{ratio['on_off']:.3f}", spread, f"{ratio['noise']:.1%}"]
        rows.append([load.words, *numbers, f"{ratio['undisturbed']:.3f}", f"{ratio['cpu']:.3f}"])
    columns = ["work", "off, ms", "on, ms", "on / off", "middle half", "off / off", "fastest blocks", "CPU time"]
    return Table(title="Time of all steps, saving off and on", columns=columns, rows=rows)


def _memory_table(memory: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            how,
            f"{entry['peak_slots']} of {entry['slots']}",
            f"{entry['peak_ready_bytes'] / 2**20:.1f}",
            f"{entry['peak_bytes'] / 2**20:.1f}",
            f"{entry['configured_bytes'] / 2**20:.1f}",
            entry["chunks_dropped"],
        ]
        for how, entry in memory.items()
    ]
    columns = ["chunks", "slots at the peak", "on offer, MiB", "together, MiB", "configured, MiB", "chunks dropped"]
    return Table(title="Memory of saving", columns=columns, rows=rows)
