"""The shard: a process that runs the engine's loop in one thread and does little else.

Other threads only bring requests from the replica, send it outputs (link.py) and let node stores pull finished chunks
(Ray, in a concurrency group of its own: nothing else makes an export wait). One shard is one whole model for now; with
tensor parallelism it will be one rank.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from actors.engine.params import SamplingParams
from actors.engine.turns import EngineConfig, FinishReason, ReadyChunk, Request, TurnOutput
from actors.hbm_eviction import HbmEviction
from actors.link import ShardEnd
from actors.sources import restore_sources
from actors.wire import AbortTurn, AddTurn, Harvest, TurnRequest
from policies import messages as m
from storage.filesystem import open_reader
from storage.header import Bytes
from storage.keys import KeySpace
from storage.parts import in_parts
from storage.tier import ChunkOpener

if TYPE_CHECKING:
    from actors.engine.engine import Engine

IDLE_WAIT_S = 0.5
WARM_UP_RUNS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What a shard needs to know at birth."""

    engine: EngineConfig
    salt: str = ""
    ssd_url: str | None = None  # read directly, without a stop in DRAM
    object_url: str | None = None
    eviction: str = "policies.eviction:LookAhead"  # of chunks in HBM


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What clients must know of the model to build prompts and keys."""

    key_space: KeySpace
    chunk_tokens: int
    context_window: int
    max_turn_tokens: int  # prompt and answer of one turn together
    kv_tokens: int  # capacity of a replica's pool
    kv_bytes_per_token: int
    vocab_size: int
    prefill_tokens_per_s: float
    dtype: str
    device: str

    @property
    def root(self) -> str:
        """Key of the empty prefix for those who belong to no tenant."""
        return self.key_space.root()

    def tenant_root(self, salt: str) -> str:
        """Key of the empty prefix for a tenant: what is stored under it is found under no other."""
        return self.key_space.salted(salt).root() if salt else self.root


class Shard:
    """Plain class; becomes a threaded actor (groups: control, io) where a replica creates it."""

    def __init__(self, plan: ShardPlan, replica: str, store: str) -> None:
        """`replica` is the address of its end of the link, `store` the name of the node store's actor."""
        self._plan = plan
        self._store = ray.get_actor(store)
        self._eviction = HbmEviction(plan.eviction)
        self._news = threading.Condition()
        self._outputs: list[TurnOutput] = []
        self._chunks: list[ReadyChunk] = []
        built: Future[tuple[Engine, float]] = Future()
        threading.Thread(target=self._run, args=(built,), name="engine", daemon=True).start()
        self._engine, self._prefill_tokens_per_s = built.result()
        self._max_turn_tokens = min(
            self._engine.loaded.context_window, plan.engine.num_blocks * plan.engine.block_tokens
        )
        self._key_space = self._engine.loaded.key_space(plan.salt)
        self._root = self._key_space.root()
        self._readers: dict[m.Tier, ChunkOpener] = {
            name: open_reader(url)
            for name, url in ((m.Tier.SSD, plan.ssd_url), (m.Tier.OBJECT, plan.object_url))
            if url is not None
        }
        self._link = ShardEnd(replica)
        for work in (self._receive, self._send):
            threading.Thread(target=self._guard, args=(work,), name=work.__name__.strip("_"), daemon=True).start()

    # --- control ------------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def info(self) -> ModelInfo:
        loaded, config = self._engine.loaded, self._plan.engine
        return ModelInfo(
            key_space=self._key_space,
            chunk_tokens=config.chunk_tokens,
            context_window=loaded.context_window,
            max_turn_tokens=self._max_turn_tokens,
            kv_tokens=config.kv_tokens,
            kv_bytes_per_token=loaded.kv_bytes_per_token,
            vocab_size=loaded.vocab_size,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            dtype=loaded.dtype,
            device=str(loaded.device),
        )

    @ray.method(concurrency_group="control")
    def drop_chunks(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            self._engine.drop_chunk(key)

    @ray.method(concurrency_group="control")
    def forget(self, marks: tuple[str, ...]) -> None:
        """What begins with one of these prefixes leaves HBM and the write buffer (Engine.forget)."""
        self._engine.forget(marks)

    @ray.method(concurrency_group="control")
    def kept(self, keys: tuple[str, ...]) -> list[str]:
        """Which of these chunks are in HBM, full ones or tails."""
        return self._engine.kept(keys)

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "hbm_policy_faults": self._eviction.num_faults, **self._engine.stats()}

    # --- io -----------------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="io")
    def export_chunk(self, key: str) -> list[Bytes]:
        """The chunk's Arrow bytes, in parts; the caller owns the object and the write buffer forgets it."""
        return in_parts(self._engine.take_chunk(key))

    # --- turns in -----------------------------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        """One direction of the link. Without its replica this shard ends."""
        try:
            work()
        except OSError as error:
            log.warning("this shard ends: %s", error)
        except Exception:
            log.exception("the link broke; this shard ends")
        os._exit(1)

    def _receive(self) -> None:
        while True:
            match self._link.receive():
                case AddTurn(request, steps):
                    self._add(request, steps)
                case AbortTurn(turn_id):
                    self._engine.abort(turn_id)

    def _add(self, turn: TurnRequest, steps: tuple[m.RestoreStep, ...]) -> None:
        """A turn that cannot be taken fails alone."""
        try:
            self._engine.add(self._request(turn, steps))
        except Exception as error:  # the thread must live on, and the client hear of it
            if not isinstance(error, ValueError):
                log.exception("turn %s could not be taken", turn.turn_id)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            refusal = TurnOutput(
                turn_id=turn.turn_id,
                finish_reason=FinishReason.FAILED,
                error=reason,
                is_refused=isinstance(error, ValueError),
            )
            self._tell([refusal], [])

    def _request(self, turn: TurnRequest, steps: tuple[m.RestoreStep, ...]) -> Request:
        return Request(
            turn_id=turn.turn_id,
            token_ids=turn.token_ids,
            sampling=turn.sampling,
            num_prior=turn.num_prior,
            cuts=turn.cuts,
            restore=restore_sources(steps, self._checkout(steps), self._readers, self._plan.engine.load_deadline_s),
            root=turn.root or self._root,
            save=turn.reuse,
        )

    def _checkout(self, steps: Sequence[m.RestoreStep]) -> Callable[[], Sequence[Any]]:
        """Brings the store's references to what is wanted from DRAM. It is asked at once unless HBM has all of it."""
        keys = [step.chunk for step in steps if step.tier == m.Tier.DRAM]

        def ask() -> Any:
            return self._store.checkout.remote(keys)

        asked = [] if len(self._engine.kept(keys)) == len(keys) else [ask()]
        return lambda: ray.get(asked[0] if asked else ask(), timeout=self._plan.engine.load_deadline_s)

    # --- outputs out --------------------------------------------------------------------------------------------------

    def _tell(self, outputs: list[TurnOutput], chunks: list[ReadyChunk]) -> None:
        with self._news:
            self._outputs += outputs
            self._chunks += chunks
            self._news.notify_all()

    def _send(self) -> None:
        """What happened while the last message was on its way goes as one."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._outputs or self._chunks)
                harvest = Harvest(self._outputs, self._chunks)
                self._outputs, self._chunks = [], []
            self._link.send(harvest)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self, built: Future[tuple[Engine, float]]) -> None:
        """The engine's thread, from the loading of the model on: OpenMP keeps threads for every thread that ever
        computed, and once they are more than the cores none of them waits for the next operation awake."""
        from actors.engine.engine import Engine  # whoever holds this actor's handle imports this file: no torch above

        try:
            engine = Engine(self._plan.engine, eviction=self._eviction)
            built.set_result((engine, self._warm_up(engine)))
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            built.set_exception(error)
            return
        self._loop(engine)

    def _loop(self, engine: Engine) -> None:
        """An engine that breaks outside a turn ends the process: the replica is started anew."""
        try:
            while True:
                outputs = engine.step() if engine.wait_for_work(IDLE_WAIT_S) else []
                chunks = engine.ready_chunks()
                if outputs or chunks:
                    self._tell(outputs, chunks)
        except Exception:
            log.exception("the engine broke; this shard ends")
            os._exit(1)

    def _warm_up(self, engine: Engine) -> float:
        """Runs one short prompt: pages, kernels and threads are warm, and the prefill rate is known (tokens/s)."""
        config, window = self._plan.engine, engine.loaded.context_window
        num_tokens = min(256, window // 2, config.kv_tokens // 2, config.max_step_tokens)
        rate = 0.0
        for attempt in range(WARM_UP_RUNS):
            request = Request(
                turn_id=f"warm-up-{attempt}",
                token_ids=tuple(range(num_tokens)),
                sampling=SamplingParams(max_new_tokens=1),
                root="warm-up",
                save=False,
            )
            engine.add(request)
            began = time.monotonic()
            while engine.has_work:
                engine.step()
            rate = num_tokens / (time.monotonic() - began)
        return rate
