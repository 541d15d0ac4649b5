"""What a transfer writes and reads, against the dull way; and that on streams of its own it is never too early."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import actors.engine.engine
from actors.engine.blocks import KVPool
from actors.engine.engine import Engine
from actors.engine.hooks import IdentityRotary
from actors.engine.load import Load
from actors.engine.overlap import LoadOrder
from actors.engine.params import SamplingParams
from actors.engine.restoring import Gate, Restoring
from actors.engine.rope import PairLayout, PhaseTable, Rotation
from actors.engine.save import WriteBuffer
from actors.engine.sequence import Sequence
from actors.engine.transfer import (
    CudaTransfer,
    Fence,
    HostTransfer,
    KVMemory,
    LayerPart,
    Transfer,
    _CudaFence,
    _StagingRing,
)
from actors.engine.turns import FinishReason, RestoreSource
from storage.format import ChunkReader, LayerShape
from tests.engine.fake_cuda import FakeCuda, FakeCudaTransfer, FakeEvent, watch
from tests.engine.harness import Owner, make_engine
from tests.engine.models import loaded, random_prompt, stock_answer
from tests.engine.test_rope import PlainRotary

CPU = torch.device("cpu")
LAYERS = (
    LayerShape(num_kv_heads=3, k_dim=16, v_dim=16),
    LayerShape(num_kv_heads=2, k_dim=16, v_dim=8),
    LayerShape(num_kv_heads=1, k_dim=24, v_dim=24),
)
CHUNK = 12
ROWS = {
    "neighbours": torch.arange(5, 45),
    "scattered": torch.randperm(60, generator=torch.Generator().manual_seed(1))[:40],
    "runs": torch.cat((torch.arange(20, 38), torch.arange(0, 18), torch.tensor([50, 49, 48, 47]))),
}
PIECES = [(0, 12), (12, 24), (15, 24), (23, 24), (24, 31)]  # one of which begins within its chunk


def _rotations(device: torch.device) -> tuple[Rotation | None, ...]:
    """All channels of the first layer, none of the second, some of the third."""
    table = PhaseTable(IdentityRotary(PlainRotary(16).to(device), None), None, "first_half")
    whole, part = (PairLayout(kind="half", place="leading", rotary_dim=16, head_dim=d) for d in (16, 24))
    return Rotation(whole, table, device), None, Rotation(part, table, device)


def kv_memory(dtype: torch.dtype, device: torch.device = CPU) -> KVMemory:
    """Poisoned."""
    pool = KVPool(LAYERS, 15, 4, dtype, device)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(float("nan"))
    return KVMemory(pool, WriteBuffer(LAYERS, 2, CHUNK, dtype, device), _rotations(device))


def _host(memory: KVMemory) -> Transfer:
    return HostTransfer(memory)


def _cuda(memory: KVMemory) -> Transfer:
    return FakeCudaTransfer(memory, LAYERS, CHUNK, num_buffers=2, max_positions=64)


def chunk_tensors(shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Raw keys and values as they come from a chunk: [H, n, D] in memory, tokens first."""
    heads = shape.num_kv_heads
    return tuple(torch.randn(heads, num_tokens, d).to(dtype).transpose(0, 1) for d in (shape.k_dim, shape.v_dim))  # type: ignore[return-value]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN too."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _write_dully(memory: KVMemory, layer: int, rows: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
    rotation: Rotation | None = memory.rotations[layer]
    turned = keys
    if rotation is not None:
        positions = torch.arange(start, start + len(rows))
        turned = rotation.rotate(keys.contiguous(), rotation.phases(positions, start + len(rows)))
    for row, k, v in zip(rows.tolist(), turned, values):
        memory.pool.keys[layer][row // 4, row % 4] = k
        memory.pool.values[layer][row // 4, row % 4] = v


@pytest.mark.parametrize("make", [_host, _cuda])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("place", ROWS)
@pytest.mark.parametrize("together", [True, False])
def test_what_is_written_is_what_the_dull_way_writes(
    make: Callable[[KVMemory], Transfer], dtype: torch.dtype, place: str, together: bool
) -> None:
    memory, dull = kv_memory(dtype), kv_memory(dtype)
    transfer, rows = make(memory), ROWS[place]
    slot = memory.buffer.take()
    assert slot is not None
    places = [
        transfer.locate(rows[start:end], start, slot if end == 31 else None, 2 if end == 31 else 0)
        for start, end in PIECES
    ]
    assert place != "neighbours" or all(isinstance(at.rows, int) for at in places)
    for layer, shape in enumerate(LAYERS):
        parts = [LayerPart(at, *chunk_tensors(shape, at.num_tokens, dtype)) for at in places]
        for given in [parts] if together else [[part] for part in parts]:
            transfer.write(layer, given)
        for part in parts:
            _write_dully(dull, layer, rows[part.at.start : part.at.end], part.at.start, part.keys, part.values)
            if part.at.slot is not None:
                assert same_bits(memory.buffer.get(layer, slot, 9)[2:], part.keys)
    for got, expected in zip((memory.pool.keys, memory.pool.values), (dull.pool.keys, dull.pool.values)):
        assert all(same_bits(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("make", [_host, _cuda])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("place", ROWS)
def test_what_is_read_is_what_was_there(make: Callable[[KVMemory], Transfer], dtype: torch.dtype, place: str) -> None:
    memory = kv_memory(dtype)
    transfer, rows = make(memory), ROWS[place][7:18]
    slot = memory.buffer.take()
    assert slot is not None
    given = [chunk_tensors(shape, len(rows), dtype) for shape in LAYERS]
    for layer, (keys, values) in enumerate(given):
        memory.buffer.put(layer, slot, keys)
        memory.pool.write(layer, rows, keys, values)
    arrays = transfer.read(transfer.locate(rows, 7, slot))
    for pair, expected in zip(arrays, given, strict=True):
        for array, tensor in zip(pair, expected):
            assert array.shape == (tensor.shape[1], tensor.shape[0], tensor.shape[2])
            assert (array.view("uint8") == tensor.transpose(0, 1).contiguous().view(torch.uint8).numpy()).all()


def test_a_staging_buffer_that_failed_goes_round_again() -> None:
    ring = _StagingRing([torch.empty(4)], FakeCuda())
    stream = FakeCuda().Stream(CPU)
    for _ in range(3):
        with pytest.raises(RuntimeError), ring.lend(stream):
            raise RuntimeError
    with ring.lend(stream) as buffer:
        assert len(buffer) == 4


# --- order, on streams that run nothing -------------------------------------------------------------------------------


def _gated(source: RestoreSource, before_layer: Callable[[int], None]) -> RestoreSource:
    """Its layers come one by one."""

    def opener(stock: Callable[[], ChunkReader] = source.open) -> ChunkReader:
        reader = stock()
        layer = reader.layer

        def later(i: int) -> Any:
            before_layer(i)
            return layer(i)

        reader.layer = later  # type: ignore[method-assign]
        return reader

    return replace(source, open=opener)


def _slow(source: RestoreSource, rng: random.Random) -> RestoreSource:
    """So slow that steps join it; now and then a layer is lost."""
    lost = rng.choice([1, 2, *[99] * 12])

    def before_layer(i: int) -> None:
        time.sleep(0.001)
        if i == lost:
            raise ConnectionError("gone")

    return _gated(source, before_layer)


def _engine(seed: int, orders: Callable[[], LoadOrder]) -> Engine:
    engine = make_engine(
        loaded("llama"),
        shuffle=seed if seed % 2 else None,
        kv_tokens=120,
        max_step_tokens=48,
        max_running_turns=3,
        write_buffer_chunks=6,
        keep_finished=seed % 3 == 0,
        staging_buffers=2,
        num_loaders=1 + seed % 2,
    )
    engine._restoring._order = lambda *_: orders()  # type: ignore[method-assign]
    engine._restoring._joins = (  # type: ignore[method-assign]
        lambda r, _: r.load.job.order is LoadOrder.LAYERS and r.may_join and r.load.layers_ready >= 1
    )
    assert isinstance(engine._saver._transfer, FakeCudaTransfer)
    watch(engine, engine._saver._transfer.fake)
    return engine


def _busy(seed: int) -> FakeCuda:
    """An engine that restores, computes, saves, keeps, preempts and aborts, with right answers."""
    rng = random.Random(seed)
    owner = Owner(_engine(seed, lambda: rng.choice(list(LoadOrder))))
    history, aborted = random_prompt(37, 100), set[str]()
    for i in range(14):
        prompt = (*history[: rng.randint(20, len(history))], *random_prompt(rng.randint(1, 12), i))
        restore = [_slow(source, rng) for source in owner.store.plan(prompt, cuts=(37,))]
        sampling = SamplingParams(max_new_tokens=3, ignore_eos=True)
        owner.add(f"t{i}", prompt, sampling, cuts=(20, 37), restore=tuple(restore))
        for _ in range(rng.randint(1, 6)):
            owner.step()
        if rng.random() < 0.2:
            aborted.add(f"t{i}")
            owner.engine.abort(f"t{i}")
        history = max(history, prompt, key=len) if len(prompt) < 70 else history
    for turn_id, result in owner.run().items():
        assert result.token_ids == stock_answer("llama", owner.requests[turn_id].token_ids, len(result.tokens))
        assert turn_id in aborted or result.finish is FinishReason.LENGTH
    _abort_under_way(owner)
    owner.engine.close()
    return owner.engine._saver._transfer.fake  # type: ignore[attr-defined]


def _abort_under_way(owner: Owner) -> None:
    """A turn leaves while it loads; its blocks are another's as soon as they are free."""
    owner.engine.forget_kept()
    under_way, go = threading.Event(), threading.Event()

    def before_layer(i: int) -> None:
        if i == 2:
            under_way.set()
            assert go.wait(20)

    prompt = (*owner.store.chunks[next(iter(owner.store.chunks))][0].token_ids, 1, 2, 3)
    owner.add("leaves", prompt, restore=tuple(_gated(source, before_layer) for source in owner.store.plan(prompt)))
    while not under_way.is_set():
        owner.step()
    owner.engine.abort("leaves")
    owner.step()
    owner.add("takes all", random_prompt(100, 77), SamplingParams(max_new_tokens=2), save=False)
    go.set()
    owner.run()


@pytest.fixture
def on_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.engine.engine, "transfer_for", FakeCudaTransfer)


SEEDS = range(6)
WORK = (
    "host writes staging", "loading reads staging", "loading writes pool", "loading writes slot",
    "saving reads pool", "saving reads slot", "host reads saved",
    "model reads pool", "model writes pool", "model writes slot",
)  # fmt: skip


@pytest.mark.usefixtures("on_fake_cuda")
def test_streams_and_events_keep_everything_in_order() -> None:
    seen = Counter[str]()
    for seed in SEEDS:
        fake = _busy(seed)
        assert fake.races == [], seed
        seen.update(fake.num_accesses)
    assert [work for work in WORK if not seen[work]] == []


def _nothing(*_: object) -> None:
    """In place of what keeps the order."""


@contextmanager
def _without_fences(load: Load) -> Iterator[None]:
    fences, load.fences = load.fences, []
    yield
    load.fences = fences


def _adopt_at_once(self: Restoring, sequence: Sequence, stock: Any = Restoring.adopt) -> Any:
    with _without_fences(self._running[sequence.turn_id].load):
        return stock(self, sequence)


def _pass_at_once(self: Gate, layer: int, stock: Any = Gate.wait) -> None:
    hold, _CudaFence.hold = _CudaFence.hold, _nothing  # type: ignore[method-assign]
    stock(self, layer)
    _CudaFence.hold = hold  # type: ignore[method-assign]


def _unwaited(self: CudaTransfer) -> Fence:
    fence = self._fence(self._loading)
    return _Unwaited(fence._event, fence._device, fence._cuda)


class _Unwaited(_CudaFence):
    def wait(self) -> None:
        """Pretends that it was reached."""


SABOTAGE: dict[str, tuple[type, str, Any]] = {
    "blocks are written before the model is done with them": (CudaTransfer, "begin_load", _nothing),
    "chunks are read before the model has written them": (CudaTransfer, "begin_save", _nothing),
    "a joined step does not hold for its layers": (Gate, "wait", _pass_at_once),
    "an adopted load is not held for": (Restoring, "adopt", _adopt_at_once),
    "a loader gives blocks back before the device is done": (CudaTransfer, "written", _unwaited),
    "events are not waited for": (FakeEvent, "synchronize", _nothing),
}


@pytest.mark.usefixtures("on_fake_cuda")
@pytest.mark.parametrize("what", SABOTAGE)
def test_the_detector_sees(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, sabotage = SABOTAGE[what]
    monkeypatch.setattr(owner, name, sabotage)
    assert any(_busy(seed).races for seed in SEEDS), f"nobody notices when {what}"
