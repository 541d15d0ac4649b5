"""Models on CUDA against stock transformers on the CPU: tokens, restores, equal bits after a reload; streams that lag.

`torch.cuda._sleep` holds up one stream at a time. Whoever did not wait for it reads poison, or writes over what is
still in use.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.engine.loading import LoadedModel
from actors.engine.overlap import LoadOrder
from actors.engine.params import SamplingParams
from actors.engine.runner import ModelRunner
from actors.engine.transfer import CudaTransfer, HostTransfer, LayerPart, TokenRows
from storage.format import read_chunk
from tests.engine.harness import Owner, make_engine
from tests.engine.models import CONFIGS, build, random_prompt, stock_answer
from tests.engine.test_transfer import CHUNK, LAYERS, PIECES, ROWS, chunk_tensors, kv_memory, same_bits

LAG_CYCLES = 20_000_000  # some 10 ms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "falcon-mqa"])
def test_on_cuda(name: str) -> None:
    model = LoadedModel.from_model(build(CONFIGS[name]()).to("cuda"))
    assert model.device.type == "cuda"
    owner = Owner(make_engine(model, shuffle=1))
    prompts = {"a": random_prompt(43, 1), "b": random_prompt(9, 2)}
    for turn_id, prompt in prompts.items():
        owner.add(turn_id, prompt)
    owner.step()
    table = owner.engine._sequences["a"].table
    results = owner.run()
    for turn_id, prompt in prompts.items():
        assert results[turn_id].token_ids == stock_answer(name, prompt, 8)
    longer = (*prompts["a"], *results["a"].token_ids[:-1], 7, 8)
    again = Owner(make_engine(model, shuffle=2), owner.store)
    again.add("a", longer, restore=tuple(owner.store.plan(longer, cuts=(50,))))
    while not again.engine._sequences or again.engine._sequences["a"].num_computed < 50:
        again.step()
    other = again.engine._sequences["a"].table
    rows, other_rows = (t.rows(0, 50).to("cuda") for t in (table, other))
    for layer in range(len(model.layers)):
        for kept, reloaded in zip(owner.engine._pool.read(layer, rows), again.engine._pool.read(layer, other_rows)):
            assert torch.equal(kept, reloaded)
    assert again.run()["a"].token_ids == stock_answer(name, longer, 8)
    assert again.results["a"].started[0].num_reused == 50


def _on_cuda(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel.from_model(build(CONFIGS[name]()).to(dtype).to("cuda"))


def _let_lag(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream is late with everything."""
    owner, name = {
        "model": (ModelRunner, "forward"),
        "loading": (CudaTransfer, "write"),
        "saving": (CudaTransfer, "read"),
    }[stream]
    stock = getattr(owner, name)

    def late(self: Any, *args: Any) -> Any:
        on = torch.cuda.current_stream() if stream == "model" else getattr(self, f"_{stream}")
        with torch.cuda.stream(on):
            torch.cuda._sleep(LAG_CYCLES)
        return stock(self, *args)

    monkeypatch.setattr(owner, name, late)


@pytest.mark.parametrize("order", LoadOrder)
@pytest.mark.parametrize("lag", ["model", "loading", "saving"])
def test_a_stream_that_lags_changes_no_answer(lag: str, order: LoadOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _on_cuda("llama")
    owner = Owner(make_engine(model, shuffle=1, order=order, kv_tokens=160, staging_buffers=2, load_deadline_s=1e9))
    owner.engine._restoring._joins = (  # type: ignore[method-assign]
        lambda r, _: r.load.job.order is LoadOrder.LAYERS and r.may_join and r.load.layers_ready >= 1
    )
    _let_lag(lag, monkeypatch)
    base = random_prompt(50, 1)
    for i in range(4):  # each restores what the first has saved, in blocks that the one before has used
        prompt = (*base, *random_prompt(3 + i, 10 + i))
        restore = tuple(owner.store.plan(prompt, cuts=(50,)))
        owner.add(f"t{i}", prompt, SamplingParams(max_new_tokens=6, ignore_eos=True), cuts=(50,), restore=restore)
        owner.run()
        assert owner.results[f"t{i}"].token_ids == stock_answer("llama", prompt, 6)
        assert (owner.results[f"t{i}"].started[0].num_reused > 0) == (i > 0)
    owner.engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_saved_after_a_reload_has_the_same_bits(dtype: torch.dtype) -> None:
    """The raw keys and the values of a tail that was restored and extended are those it was saved with."""
    model, prompt = _on_cuda("llama", dtype), random_prompt(22, 3)
    first = Owner(make_engine(model))
    first.add("t", prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))
    tokens = (*prompt, *first.run()["t"].token_ids[:-1])
    tail = first.store.chunks[first.store.plan(tokens)[-1].key]
    second = Owner(make_engine(model, shuffle=3))
    second.add("longer", (*tokens, 5, 6, 7, 8), restore=tuple(first.store.plan(tokens)))
    second.run()
    [extended] = [chunk for chunk in second.store.chunks.values() if chunk[0].start == tail[0].start]
    old, new = read_chunk(tail[1]), read_chunk(extended[1])
    for layer in range(len(model.layers)):
        for a, b in zip(old.layer(layer), new.layer(layer)):
            assert (a == b[:, : a.shape[1]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", ROWS)
def test_the_transfer_writes_and_reads_what_the_host_does(place: str, dtype: torch.dtype) -> None:
    """Values and raw keys bit for bit; rotated keys too where nothing rotates, else within rounding."""
    host, there = kv_memory(dtype, torch.device("cpu")), kv_memory(dtype, torch.device("cuda"))
    transfers = HostTransfer(host), CudaTransfer(there, LAYERS, CHUNK, num_buffers=2, max_positions=64)
    slot = host.buffer.take()
    assert slot is not None
    assert slot == there.buffer.take()
    rows = ROWS[place]
    for start, end in PIECES:
        given = [chunk_tensors(shape, end - start, dtype) for shape in LAYERS]
        for transfer in transfers:
            at = transfer.locate(rows[start:end], start, slot if end == 31 else None)
            transfer.begin_load(transfer.computed())
            for layer, (keys, values) in enumerate(given):
                transfer.write(layer, [LayerPart(at, keys, values)])
            transfer.written().hold()
    for layer in range(len(LAYERS)):
        for on_host, on_device in ((host.pool.keys, there.pool.keys), (host.pool.values, there.pool.values)):
            torch.testing.assert_close(on_device[layer].cpu(), on_host[layer], equal_nan=True)
        assert same_bits(there.pool.values[layer].cpu(), host.pool.values[layer])
    read = [transfer.read(transfer.locate(rows[24:31], 24, slot)) for transfer in transfers]
    for pair, other in zip(*read, strict=True):
        assert all((a.view("uint8") == b.view("uint8")).all() for a, b in zip(pair, other))


def test_loading_waits_for_nothing_but_its_own_buffers() -> None:
    """torch counts everything that waits for a stream, except waiting for an event."""
    memory = kv_memory(torch.bfloat16, torch.device("cuda"))
    transfer = CudaTransfer(memory, LAYERS, CHUNK, num_buffers=2, max_positions=64)
    slot = memory.buffer.take()

    def move(rows: torch.Tensor) -> None:
        at: TokenRows = transfer.locate(rows, 0, slot)
        transfer.begin_load(transfer.computed())
        for layer, shape in enumerate(LAYERS):
            transfer.write(layer, [LayerPart(at, *chunk_tensors(shape, len(rows), torch.bfloat16))])
        transfer.written().hold()
        transfer.begin_save(transfer.computed())
        transfer.read(at)

    for rows in ROWS.values():
        move(rows[:12])  # the first time memory is asked for
        torch.cuda.set_sync_debug_mode("error")
        try:
            move(rows[:12])
        finally:
            torch.cuda.set_sync_debug_mode("default")
