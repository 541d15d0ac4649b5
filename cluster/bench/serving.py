"""What HTTP and Ray Serve cost: a returning turn through them, against the same turn asked of the cluster directly.

One deployment as `reprise serve` makes it. Conversations of equal length side by side, one asked through HTTP, one
through the Python client of the same scheduler and replica, one of an engine in this process: a long first turn, then
short ones, each after a pause, whose times to first token count. Then so many chats at a time stream their answers,
through HTTP and directly.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from actors.engine.loading import LoadedModel, load_tokenizer
from actors.engine.params import SamplingParams
from actors.wire import Delta, TurnRequest
from cluster.bench.options import BenchOptions
from cluster.bench.result import Result, Table, Target, median_ratio
from cluster.bench.turns import TurnBench
from cluster.bringup import connect
from cluster.chat import ChatFormat, Transcript
from cluster.client import Client
from cluster.config import Config, config_from
from cluster.conversations import Message

HISTORY_WORDS, NEW_WORDS, ANSWER_TOKENS, NUM_CHATS, STREAM_TOKENS = 700, 24, 16, 32, 48
NUM_RETURNS, QUICK_NUM_RETURNS = 4, 1
MAX_STREAM_ROUNDS = 4
THINK_S = 1.5  # before every turn nobody does anything for so long; what was computed before is saved by then
QUICK_HISTORY_WORDS, QUICK_NUM_CHATS, QUICK_STREAM_TOKENS = 60, 4, 8
MAX_ADDED_S, MAX_TTFT_RATIO, MIN_STREAM_RATIO = 0.010, 1.15, 0.95
WARM_UPS = 1
WORDS = ("river", "stone", "lantern", "harbour", "window", "letter", "garden", "bridge", "copper", "winter", "music")

LIMITS = (
    "Added by HTTP: Serve's proxy process, the front process that renders and tokenises, and one more hop of every"
    " piece. On few cores all of them share the cores with the model. With RAY_SERVE_ENABLE_HA_PROXY=1 HAProxy takes"
    " the place of Serve's proxy, and a piece saves a hop between Ray's actors.",
)


def run(options: BenchOptions) -> Result:
    with options.scratch_folder("serving") as folder, _deployment(options, folder) as deployed:
        return asyncio.run(_measure(options, deployed))


@dataclass
class _Deployed:
    """The running application, reached both ways."""

    url: str
    client: Client
    chat: ChatFormat
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def words(self, count: int) -> str:
        """New ones every time."""
        return " ".join(self.rng.choice(WORDS) for _ in range(count))


@contextmanager
def _deployment(options: BenchOptions, folder: Path) -> Iterator[_Deployed]:
    options.progress("bringing up the deployment")
    config = _config(options, folder)
    started_ray = connect(config)
    import ray
    from ray import serve

    from cluster.serving.deployment import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(build(config), name="reprise", route_prefix="/")
        state = serve.get_deployment_handle("keeper", "reprise").state.remote().result(timeout_s=60)
        chat = ChatFormat(load_tokenizer(options.model))
        yield _Deployed(f"http://127.0.0.1:{port}", Client(state.scheduler, state.model), chat)
    finally:
        serve.shutdown()
        if started_ray:
            ray.shutdown()


def _config(options: BenchOptions, folder: Path) -> Config:
    model = {
        "path": options.model,
        "dtype": options.computed_dtype,
        "device": options.computed_device,
        "num_threads": options.threads,
        "max_running_turns": NUM_CHATS,
    }
    if options.quick:
        model |= {"chunk_tokens": 32, "kv_tokens": 8192}
    return config_from(
        {
            "model": model,
            "store": {"dram_bytes": "256MiB", "ssd_url": str(folder / "ssd"), "ssd_bytes": "4GiB"},
            "cluster": {"cpus_per_replica": 1, "gpus_per_replica": 1 if options.computed_device == "cuda" else 0},
        }
    )


# --- one returning turn -----------------------------------------------------------------------------------------------


async def _measure(options: BenchOptions, deployed: _Deployed) -> Result:
    async with httpx.AsyncClient(base_url=deployed.url, timeout=300) as http:
        samples, cached, num_tokens = await _returning_turns(options, deployed, http)
        floor = await _floor(http, 50 if not options.quick else 5)
        streams = await _streams(options, deployed, http)
    return _result(options, samples, cached, floor, streams, num_tokens)


async def _returning_turns(
    options: BenchOptions, deployed: _Deployed, http: httpx.AsyncClient
) -> tuple[dict[str, list[float]], dict[str, list[int]], int]:
    """TTFT by way, cached tokens by way, and tokens of a prompt. Three conversations go on side by side, so that their
    turns are neighbours in time: one asked directly, one through HTTP, and one of an engine alone, which computes as
    many new tokens as the turn through HTTP."""
    samples: dict[str, list[float]] = {"engine": [], "direct": [], "http": []}
    cached: dict[str, list[int]] = {"direct": [], "http": []}
    num_tokens: list[int] = []
    with ExitStack() as stack:
        alone: Callable[[int], float] | None = None
        for turn in range(WARM_UPS + options.repeats):
            options.progress(f"a chat with returning turns, round {turn + 1} of {WARM_UPS + options.repeats}")
            chats: dict[str, _DirectChat | _HttpChat] = {
                "direct": _DirectChat(deployed),
                "http": _HttpChat(deployed, http),
            }
            for number, count in enumerate(_words_of_turns(options)):
                found: dict[str, _Return] = {}
                for way in sorted(chats, reverse=(turn + number) % 2 == 0):
                    await asyncio.sleep(THINK_S)
                    found[way] = await chats[way].ask(count)
                if not number:
                    continue
                alone = alone or stack.enter_context(_engine_alone(options, found["http"].num_cached))
                seconds = alone(found["http"].num_new)
                if turn < WARM_UPS:
                    continue
                samples["engine"].append(seconds)
                num_tokens.append(found["http"].num_tokens)
                for way, one in found.items():
                    samples[way].append(one.ttft_s)
                    cached[way].append(one.num_cached)
    return samples, cached, round(median(num_tokens))


def _words_of_turns(options: BenchOptions) -> tuple[int, ...]:
    """New words of each turn."""
    if options.quick:
        return (QUICK_HISTORY_WORDS, *[NEW_WORDS] * QUICK_NUM_RETURNS)
    return (HISTORY_WORDS, *[NEW_WORDS] * NUM_RETURNS)


@dataclass(frozen=True, slots=True)
class _Return:
    """A returning turn."""

    ttft_s: float
    num_cached: int
    num_tokens: int
    """Of its prompt."""

    @property
    def num_new(self) -> int:
        """Tokens to compute."""
        return max(1, self.num_tokens - self.num_cached)


class _DirectChat:
    """A conversation with the cluster."""

    def __init__(self, deployed: _Deployed) -> None:
        self._deployed = deployed
        self._transcript = Transcript(deployed.chat, "bench")
        self._name = f"bench-{deployed.rng.random()}"
        self._num_turns = 0

    async def ask(self, num_words: int) -> _Return:
        self._num_turns += 1
        prompt = self._transcript.prompt([Message("user", self._deployed.words(num_words))])
        request = TurnRequest(
            turn_id=f"{self._name}#{self._num_turns}",
            session_id=self._name,
            token_ids=prompt.token_ids,
            cuts=prompt.cuts,
            sampling=SamplingParams(max_new_tokens=ANSWER_TOKENS, ignore_eos=True),
        )
        answer = await self._deployed.client.run(request)
        self._transcript.add_answer(answer.token_ids, answer.text)
        assert answer.ttft_s is not None
        return _Return(answer.ttft_s, sum(answer.account.reused.values()), answer.account.num_prompt_tokens)


class _HttpChat:
    """A conversation over HTTP."""

    def __init__(self, deployed: _Deployed, http: httpx.AsyncClient) -> None:
        self._deployed, self._http = deployed, http
        self._messages: list[dict[str, str]] = []

    async def ask(self, num_words: int) -> _Return:
        self._messages.append({"role": "user", "content": self._deployed.words(num_words)})
        stream = await _ask(self._http, self._messages, ANSWER_TOKENS)
        self._messages.append({"role": "assistant", "content": stream.text})
        usage = stream.usage
        return _Return(stream.ttft_s, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"])


@dataclass
class _Stream:
    """What a streamed answer brought."""

    ttft_s: float = 0.0
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


async def _ask(http: httpx.AsyncClient, messages: Sequence[dict[str, str]], max_tokens: int) -> _Stream:
    asked = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found = _Stream()
    began = time.perf_counter()
    async with http.stream("POST", "/v1/chat/completions", json=asked) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            found.usage = chunk.get("usage") or found.usage
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if not found.ttft_s and "content" in delta and "role" not in delta:
                    found.ttft_s = time.perf_counter() - began
                found.text += delta.get("content") or ""
    return found


async def _floor(http: httpx.AsyncClient, count: int) -> list[float]:
    """Seconds of a request that needs no turn."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        (await http.get("/v1/models")).raise_for_status()
        seconds.append(time.perf_counter() - began)
    return seconds


@contextmanager
def _engine_alone(options: BenchOptions, num_cached: int) -> Iterator[Callable[[int], float]]:
    """Runs a turn of so many new tokens behind such a history in an engine of this process, as `bench ttft` does (the
    history, in chunks, in HBM), after the same pause: its TTFT."""
    loaded = LoadedModel.load(options.model, dtype=options.computed_dtype, device=options.computed_device)
    chunk = 32 if options.quick else 128
    history = max(1, round(num_cached / chunk)) * chunk
    bench = TurnBench(loaded, history, num_threads=options.threads, quick=options.quick)

    def once(num_new: int) -> float:
        bench.warm_hbm()
        time.sleep(THINK_S)
        return bench.run((*bench.history, *bench.tokens(num_new))).ttft_s

    try:
        yield once
    finally:
        bench.close()


# --- many streams -----------------------------------------------------------------------------------------------------


async def _streams(options: BenchOptions, deployed: _Deployed, http: httpx.AsyncClient) -> dict[str, list[float]]:
    """Tokens a second of many chats at a time."""
    chats = QUICK_NUM_CHATS if options.quick else NUM_CHATS
    tokens = QUICK_STREAM_TOKENS if options.quick else STREAM_TOKENS
    rates: dict[str, list[float]] = {"direct": [], "http": []}
    rounds = 1 + min(options.repeats, MAX_STREAM_ROUNDS)
    for turn in range(rounds):
        options.progress(f"{chats} chats at a time, round {turn + 1} of {rounds}")
        for way in ("direct", "http") if turn % 2 == 0 else ("http", "direct"):
            prompts = [deployed.words(NEW_WORDS) for _ in range(chats)]
            began = time.perf_counter()
            if way == "http":
                work = [_ask(http, [{"role": "user", "content": words}], tokens) for words in prompts]
                await asyncio.gather(*work)
            else:
                await asyncio.gather(*(_stream_directly(deployed, words, tokens) for words in prompts))
            if turn:
                rates[way].append(chats * tokens / (time.perf_counter() - began))
    return rates


async def _stream_directly(deployed: _Deployed, words: str, tokens: int) -> None:
    name = f"bench-{deployed.rng.random()}"
    prompt = Transcript(deployed.chat, name).prompt([Message("user", words)])
    pieces: list[Delta] = []
    request = TurnRequest(
        turn_id=name,
        session_id=name,
        token_ids=prompt.token_ids,
        cuts=prompt.cuts,
        sampling=SamplingParams(max_new_tokens=tokens, ignore_eos=True),
    )
    await deployed.client.run(request, on_delta=pieces.append)


# --- the result -------------------------------------------------------------------------------------------------------


def _result(
    options: BenchOptions,
    samples: dict[str, list[float]],
    cached: dict[str, list[int]],
    floor: list[float],
    streams: dict[str, list[float]],
    num_tokens: int,
) -> Result:
    added_s = median(http - direct for http, direct in zip(samples["http"], samples["direct"], strict=True))
    to_engine = median_ratio(samples["http"], samples["engine"])
    to_direct = median_ratio(samples["http"], samples["direct"])
    kept_up = median_ratio(streams["http"], streams["direct"])
    names = {"engine": "an engine alone", "direct": "the cluster, asked directly", "http": "HTTP through Ray Serve"}
    turns = [(names[way], 1e3 * median(samples[way]), _cached(cached.get(way))) for way in samples]
    rates = [(names[way], median(streams[way])) for way in streams]
    return Result(
        name="serving",
        setup=options.setup(
            prompt_tokens=num_tokens,
            chats=QUICK_NUM_CHATS if options.quick else NUM_CHATS,
            proxy="HAProxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "Ray Serve's",
        ),
        tables=[
            Table(
                title="Returning turns of a chat", columns=("asked through", "TTFT p50 ms", "cached tokens"), rows=turns
            ),
            Table(title="Chats at a time", columns=("asked through", "tokens/s"), rows=rates),
        ],
        figures={
            "ttft_s": samples,
            "cached_tokens": cached,
            "added_s": added_s,
            "http_to_direct": to_direct,
            "http_to_engine": to_engine,
            "models_request_s": floor,
            "tokens_per_s": streams,
            "streams_http_to_direct": kept_up,
        },
        targets=[
            Target(measure="added by HTTP and Serve, p50 s", comparison="<=", bound=MAX_ADDED_S, value=added_s),
            Target(measure="TTFT HTTP / engine alone", comparison="<=", bound=MAX_TTFT_RATIO, value=to_engine),
            Target(measure="tokens/s HTTP / direct", comparison=">=", bound=MIN_STREAM_RATIO, value=kept_up),
        ],
        limits=[*LIMITS, f"A request that needs no turn takes {1e3 * median(floor):.1f} ms (p50)."],
    )


def _cached(counts: Sequence[int] | None) -> str:
    return f"{median(counts):g}" if counts else ""
