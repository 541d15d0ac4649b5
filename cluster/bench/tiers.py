"""How close each tier comes to the hardware: GB/s of saving and loading against memcpy and raw files, requests to S3.

Chunks have the model's layers and heads. A save starts at keys and values as the engine has them; a load is done when
every layer is verified and copied into memory that exists already. What a first touch costs is not counted.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from cluster.bench.dram import measure_dram
from cluster.bench.kv import TurnKV, make_turn_kv
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.s3 import DELAY_S, measure_s3
from cluster.bench.ssd import measure_ssd
from cluster.bench.timing import Samples
from storage.format import LayerShape

CHUNK_TOKENS, NUM_CHUNKS = 256, 8  # 2,048 tokens
QUICK_CHUNK_TOKENS, QUICK_NUM_CHUNKS = 32, 2
TARGET_SHARE = 0.8

# case -> (what it is measured against, what it is called)
DRAM_CASES = {
    "encode": ("memcpy", "encode (transpose, frame, checksum)"),
    "checksum": ("memcpy", "checksum alone (xxh3-64)"),
    "put": ("memcpy", "ray.put of the encoded bytes"),
    "export": ("memcpy", "an actor's export of encoded bytes"),
    "save": ("memcpy", "save: encode in the actor's saver thread, export as they are done"),
    "load": ("memcpy", "load: get, verify, copy out"),
    "load_2": ("memcpy_2", "load by 2 threads (against memcpy by 2)"),
}
SSD_CASES = {
    "ssd_write": ("raw_write", "write: temporary file, fsync, rename, fsync of the folder"),
    "ssd_write_4": ("raw_write_4", "the same by 4 threads (against raw by 4)"),
    "ssd_read": ("raw_read", "read, in the page cache: verify, copy out"),
    "ssd_read_cold": ("raw_read_cold", "read, not in the page cache"),
}


def run(options: BenchOptions) -> Result:
    layers, dtype = _shapes(options)
    chunk_tokens, num_chunks = (QUICK_CHUNK_TOKENS, QUICK_NUM_CHUNKS) if options.quick else (CHUNK_TOKENS, NUM_CHUNKS)
    turn = make_turn_kv(layers, dtype, chunk_tokens, num_chunks)
    options.progress("DRAM")
    samples = measure_dram(turn, options.repeats)
    with options.scratch_folder("tiers") as folder:
        options.progress("SSD")
        samples |= measure_ssd(turn, folder, options.repeats)
    options.progress("S3")
    s3 = measure_s3(turn, options.repeats)
    setup = options.setup(
        chunk_tokens=chunk_tokens,
        num_chunks=num_chunks,
        num_layers=len(layers),
        chunk_bytes=turn.chunks[0].nbytes,
        turn_bytes=turn.num_bytes,
        scratch=str(Path(options.scratch).absolute()),
        s3_delay_s=DELAY_S,
    )
    return _result(setup, turn, samples, s3)


def _shapes(options: BenchOptions) -> tuple[tuple[LayerShape, ...], str]:
    from actors.engine.loading import LoadedModel

    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device="cpu")
    return loaded.layers, loaded.dtype


def _result(setup: dict[str, Any], turn: TurnKV, samples: Samples, s3: dict[str, Any]) -> Result:
    shares = {
        case: median_ratio(samples[baseline], samples[case])
        for case, (baseline, _) in {**DRAM_CASES, **SSD_CASES}.items()
    }
    speeds = {case: turn.num_bytes / median(seconds) / 1e9 for case, seconds in samples.items()}
    num_chunks = len(turn.chunks)
    per_chunk = sum(s3["requests"].values()) / num_chunks if "requests" in s3 else None
    return Result(
        name="tiers",
        setup=setup,
        tables=[
            _table("DRAM (Ray's object store)", DRAM_CASES, speeds, shares),
            _table("SSD (files)", SSD_CASES, speeds, shares),
            _s3_table(s3, num_chunks),
        ],
        figures={
            "seconds": samples,
            "gigabytes_per_s": speeds,
            "share_of_baseline": shares,
            "baseline": {case: baseline for case, (baseline, _) in {**DRAM_CASES, **SSD_CASES}.items()},
            "s3": s3,
        },
        targets=[
            _at_least("save to DRAM / memcpy", shares["save"]),
            _at_least("load from DRAM / memcpy", shares["load"]),
            _at_least("SSD write with fsync / raw file", shares["ssd_write"]),
            _at_least("SSD read / raw file", shares["ssd_read"]),
            _at_least("SSD read / raw file, not in the page cache", shares["ssd_read_cold"]),
            Target(
                measure="S3 requests per chunk of a restored turn",
                comparison="<=",
                bound=1,
                value=per_chunk,
                note=s3.get("note", ""),
            ),
        ],
        limits=_limits(samples, shares, num_chunks),
    )


def _limits(samples: Samples, shares: dict[str, float], num_chunks: int) -> list[str]:
    ms = {case: 1e3 * median(seconds) / num_chunks for case, seconds in samples.items()}
    best_load = ms["memcpy"] / (ms["memcpy"] + ms["checksum"])
    one_by_one = ms["memcpy"] / (ms["encode"] + ms["put"])
    return [
        f"Save to DRAM: memcpy is one copy ({ms['memcpy']:.2f} ms a chunk); a save is a transposing copy with checksum"
        f" ({ms['encode']:.2f} ms) and Ray's copy into its store ({ms['put']:.2f} ms, of which {ms['put_small']:.2f} ms"
        f" for an object of any size): one after the other {one_by_one:.2f} of memcpy, whatever else is done well.",
        f"Load from DRAM: every byte is read once more for its checksum ({ms['checksum']:.2f} ms a chunk); with a free"
        f" head and perfect copies that leaves {best_load:.2f} of memcpy on one core. Two cores are bound by memory:"
        f" two memcpys at once are {ms['memcpy'] / ms['memcpy_2']:.2f} times as fast as one.",
        "SSD write: a chunk is synced, renamed and its folder synced, the raw file only synced; several writers share"
        f" the device's syncs ({shares['ssd_write_4']:.2f} with 4 threads, which is what a node store has).",
        "SSD read: a layer is read into a small buffer, verified and copied out, each step while the next pages come"
        " from the disk; the raw file is read in small pieces too, because one big read waits for all of its pages.",
        f"S3: a turn's requests are under way together; {DELAY_S * 1e3:.0f} ms is one round trip, the rest is moto.",
    ]


def _at_least(measure: str, share: float) -> Target:
    return Target(measure=measure, comparison=">=", bound=TARGET_SHARE, value=share)


def _table(title: str, cases: dict[str, tuple[str, str]], speeds: dict[str, float], shares: dict[str, float]) -> Table:
    rows = [
        [words, f"{speeds[case]:.2f}", f"{speeds[baseline]:.2f}", f"{shares[case]:.2f}"]
        for case, (baseline, words) in cases.items()
    ]
    return Table(title=title, columns=["what", "GB/s", "memcpy or raw, GB/s", "share"], rows=rows)


def _s3_table(s3: dict[str, Any], num_chunks: int) -> Table:
    columns = ["chunks", "requests", "time", "one round trip"]
    if "note" in s3:
        return Table(title=f"OBJECT (S3): not measured, {s3['note']}", columns=columns, rows=[])
    requests = ", ".join(f"{count:g} {method}" for method, count in sorted(s3["requests"].items()))
    row: list[str | int] = [num_chunks, requests, f"{median(s3['s']) * 1e3:.0f} ms", f"{DELAY_S * 1e3:.0f} ms"]
    return Table(title="OBJECT (S3: moto on the loopback, late by one round trip)", columns=columns, rows=[row])
