"""How fast the engine computes, against transformers: `generate` and its continuous batching, same weights, same run.

Every round runs all three on the same prompts, one after the other, and notes when each token came. Nothing is saved or
reused, so what is compared is the forward and what lies around it. A batch is given at once: `generate` pads it (its
prompts are of one length: no padding is wasted) and computes all of it in one forward; the two others share their steps
out, with the same step budget, large enough for a prompt of the longest kind.

    prefill tokens/s = tokens of all prompts / time until the last answer's first token
    decode tokens/s  = tokens / time from then on, until the first answer ends: all prompts decode all the time
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from actors.engine.engine import Engine
from actors.engine.loading import LoadedModel, find_folder
from actors.engine.params import SamplingParams
from actors.engine.turns import EngineConfig, Request
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio

STEP_TOKENS = 2048  # with 512, the engine's default, prefill is slower: see docs/benchmarks.md
DECODE_TOKENS = 32
ENGINE, GENERATE, CONTINUOUS = "engine", "generate", "continuous batching"
RIVALS = (GENERATE, CONTINUOUS)
PHASES = ("prefill", "decode")
TARGET_RATIO = 1.0
MAX_ROUNDS = 3  # all of it is one long measurement; pairs of some seconds differ little
PAGE_TOKENS = 256  # of transformers' continuous batching, by default

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """So many prompts at once, of so many tokens each."""

    batch: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}"

    @property
    def new_tokens(self) -> int:
        """Of each answer: enough to decode on when the last prompt has been computed, some steps after the first."""
        return DECODE_TOKENS + 2 + -(-self.batch * self.prompt_tokens // STEP_TOKENS)

    @property
    def num_tokens(self) -> int:
        return self.batch * (self.prompt_tokens + self.new_tokens)

    def prompts(self, vocab_size: int) -> Prompts:
        rng = random.Random(self.batch)
        return [[rng.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


WORKLOADS = (Workload(batch=1, prompt_tokens=2048), Workload(batch=8, prompt_tokens=512))
QUICK_WORKLOADS = (Workload(batch=1, prompt_tokens=512), Workload(batch=8, prompt_tokens=64))


@dataclass(frozen=True)
class Timeline:
    """When the tokens of each answer came; seconds of one clock."""

    began: float
    tokens_at: Sequence[Sequence[float]]

    def prefill_rate(self, num_prompt_tokens: int) -> float:
        return num_prompt_tokens / (self._all_prefilled - self.began)

    def decode_rate(self) -> float:
        start, end = self._all_prefilled, min(times[-1] for times in self.tokens_at)
        return sum(start < at <= end for times in self.tokens_at for at in times) / (end - start)

    @property
    def _all_prefilled(self) -> float:
        return max(times[0] for times in self.tokens_at)


Contestant = Callable[[Prompts, int], Timeline]
"""Answers prompts greedily with so many tokens each."""

Samples = dict[str, dict[str, dict[str, list[float]]]]
"""Tokens per second by workload, contestant and phase, one per round."""


def run(options: BenchOptions) -> Result:
    options.progress("loading the model twice")
    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device=options.computed_device)
    stock = _load_stock(options)
    workloads = QUICK_WORKLOADS if options.quick else WORKLOADS
    engine = _make_engine(loaded, workloads, options.threads)
    contestants: dict[str, Contestant] = {
        ENGINE: lambda prompts, count: run_engine(engine, prompts, count),
        GENERATE: lambda prompts, count: run_generate(stock, prompts, count),
        CONTINUOUS: lambda prompts, count: run_continuous(stock, prompts, count),
    }
    rounds = min(options.repeats, MAX_ROUNDS)
    try:
        samples, failed = _measure(contestants, workloads, loaded.vocab_size, rounds, options.progress)
    finally:
        engine.close()
    setup = options.setup(
        rounds=rounds,
        workloads=[{"batch": w.batch, "prompt_tokens": w.prompt_tokens} for w in workloads],
        decode_tokens=DECODE_TOKENS,
        step_tokens=STEP_TOKENS,
        attention="sdpa",
    )
    return _result(setup, samples, failed, _weights(loaded.model))


# --- the three --------------------------------------------------------------------------------------------------------


def run_engine(engine: Engine, prompts: Prompts, num_new: int) -> Timeline:
    tokens_at: dict[str, list[float]] = {f"turn-{i}": [] for i in range(len(prompts))}
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    began = time.perf_counter()
    for turn_id, prompt in zip(tokens_at, prompts):
        engine.add(Request(turn_id=turn_id, token_ids=tuple(prompt), sampling=sampling, root="bench", save=False))
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"the engine failed: {output.error}")
            tokens_at[output.turn_id] += [now] * len(output.tokens)
    return Timeline(began, list(tokens_at.values()))


class _Clock(BaseStreamer):
    """Notes when `generate` hands out the tokens of a step; the prompts come first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:  # noqa: ARG002 - the contract
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def run_generate(stock: Any, prompts: Prompts, num_new: int) -> Timeline:
    clock = _Clock()
    input_ids = torch.tensor(prompts, device=stock.device)
    began = time.perf_counter()
    stock.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=_greedy(num_new),
        streamer=clock,
    )
    return Timeline(began, [clock.times[1:]] * len(prompts))


def run_continuous(stock: Any, prompts: Prompts, num_new: int) -> Timeline:
    """The clock runs from the moment its scheduler takes the first prompt: its set-up does not count."""
    pages_each = -(-(len(prompts[0]) + num_new) // PAGE_TOKENS) + 1
    with _quiet("ContinuousBatchingLogger"):
        outputs = stock.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=_greedy(num_new),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=pages_each * len(prompts), max_batch_tokens=STEP_TOKENS
            ),
            record_timestamps=True,
        )
    answers = list(outputs.values())
    if len(answers) < len(prompts) or any(len(answer.timestamps or ()) != num_new for answer in answers):
        reasons = [str(answer.error) for answer in answers if answer.error] or ["no reason given"]
        raise RuntimeError(f"{len(answers)} of {len(prompts)} answers, not all of {num_new} tokens: {reasons[0]}")
    return Timeline(min(answer.lifespan[0] for answer in answers), [answer.timestamps for answer in answers])


def _greedy(num_new: int) -> Any:
    return GenerationConfig(max_new_tokens=num_new, do_sample=False, use_cache=True, pad_token_id=0)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger silent: what matters of a failure is raised."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _load_stock(options: BenchOptions) -> Any:
    """The same weights, untouched: a model that serves engines is not stock any more."""
    model = AutoModelForCausalLM.from_pretrained(
        find_folder(options.model),
        dtype=getattr(torch, options.computed_dtype),
        attn_implementation="sdpa",
        local_files_only=True,
    )
    model.generation_config.eos_token_id = None  # answers are as long as asked for
    return model.to(options.computed_device).eval()


def _make_engine(loaded: LoadedModel, workloads: Sequence[Workload], num_threads: int) -> Engine:
    config = EngineConfig(
        model="in memory",
        kv_tokens=2 * max(w.num_tokens for w in workloads) + 1024,  # in a full pool turns are scattered, and gathered
        max_step_tokens=STEP_TOKENS,
        write_buffer_chunks=0,
        num_threads=num_threads,
    )
    return Engine(config, loaded)


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(
    contestants: Mapping[str, Contestant],
    workloads: Sequence[Workload],
    vocab_size: int,
    rounds: int,
    progress: Callable[[str], None],
) -> tuple[Samples, dict[str, str]]:
    """Samples, and why contestants other than the engine that failed have none. A short first round does not count."""
    failed: dict[str, str] = {}
    samples: Samples = {w.name: {name: {phase: [] for phase in PHASES} for name in contestants} for w in workloads}
    for turn in range(rounds + 1):
        for workload in workloads if turn else QUICK_WORKLOADS:
            for name in list(contestants)[:: 1 if turn % 2 else -1]:
                if name in failed:
                    continue
                progress(f"{name}, {workload.name}, " + (f"round {turn} of {rounds}" if turn else "warming up"))
                try:
                    timeline = contestants[name](workload.prompts(vocab_size), workload.new_tokens)
                except Exception as error:
                    if name == ENGINE:
                        raise
                    failed[name] = f"{type(error).__name__}: {error}"  # foreign code: its failure is a finding
                    continue
                if turn:
                    rates = samples[workload.name][name]
                    rates["prefill"].append(timeline.prefill_rate(workload.batch * workload.prompt_tokens))
                    rates["decode"].append(timeline.decode_rate())
    return samples, failed


# --- the result -------------------------------------------------------------------------------------------------------


def _result(setup: dict[str, Any], samples: Samples, failed: Mapping[str, str], weights: dict[str, int]) -> Result:
    targets = [
        _target(phase, workload, rival, rates, failed.get(rival, ""))
        for phase in PHASES
        for workload, rates in samples.items()
        for rival in RIVALS
    ]
    one, many = (samples[name][ENGINE] for name in samples)
    flops = 2 * weights["layer_parameters"] * median(one["prefill"])
    bytes_per_s = weights["decode_bytes"] * median(one["decode"])
    return Result(
        name="engine",
        setup=setup,
        tables=[_table(samples)],
        figures={"tokens_per_s": samples, "prefill_flops": flops, "weight_bytes_per_s": bytes_per_s, **weights},
        targets=targets,
        limits=(
            f"prefill: {flops / 1e9:.0f} GFLOP/s in the matrix products of the layers alone, which"
            " are the same in all three and take most of the time; attention takes most of the rest",
            f"decode of one: reading the weights for every token, {bytes_per_s / 1e9:.1f} GB/s; the"
            " history's KV comes on top",
            f"decode of eight: {median(many['decode']) / median(one['decode']):.1f} times the tokens of one, because"
            " the weights are read once for all eight",
            "continuous batching: copies its cache and builds masks in every layer, and runs in a thread of its own",
        ),
    )


def _target(
    phase: str, workload: str, rival: str, rates: Mapping[str, Mapping[str, list[float]]], reason: str
) -> Target:
    value = None if reason else median_ratio(rates[ENGINE][phase], rates[rival][phase])
    return Target(
        measure=f"{phase} tokens/s, {workload}: engine / {rival}",
        comparison=">=",
        bound=TARGET_RATIO,
        value=value,
        note=reason,
    )


def _table(samples: Samples) -> Table:
    rows: list[list[str | float | int | None]] = []
    for phase in PHASES:
        for workload, rates in samples.items():
            medians = [median(rates[name][phase]) if rates[name][phase] else None for name in (ENGINE, *RIVALS)]
            rows.append([f"{phase}, {workload}", *(value and round(value, 1) for value in medians)])
    return Table(title="tokens per second, medians", columns=["", ENGINE, *RIVALS], rows=rows)


def _weights(model: Any) -> dict[str, int]:
    """What a prefilled token goes through (the layers), and what a decode step reads (the output matrix as well)."""
    embedding, output = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    layers = [p for p in model.parameters() if p is not embedding and p is not output]
    read = layers if output is None else [*layers, output]
    return {"layer_parameters": sum(p.numel() for p in layers), "decode_bytes": sum(p.nbytes for p in read)}
