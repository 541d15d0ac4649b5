"""KV reloaded from chunks against KV that stayed in HBM: the same bits, in the pool and in the logits."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from actors.engine.blocks import BlockTable
from actors.engine.engine import Engine
from actors.engine.params import SamplingParams
from actors.engine.runner import BatchPart, build_batch
from storage.format import read_chunk
from tests.engine.harness import Owner, make_engine
from tests.engine.models import loaded, random_prompt

DTYPES = [torch.float32, torch.bfloat16]
ANSWER = SamplingParams(max_new_tokens=9, ignore_eos=True)


def _run_and_keep_table(owner: Owner, turn_id: str) -> BlockTable:
    """The turn's block table; its blocks keep their content as long as nothing else runs."""
    owner.step()
    table = owner.engine._sequences[turn_id].table
    owner.run()
    return table


def _pool(engine: Engine, table: BlockTable, num_tokens: int) -> Iterable[tuple[Tensor, Tensor]]:
    rows = table.rows(0, num_tokens)
    for layer in range(len(engine.loaded.layers)):
        yield engine._pool.read(layer, rows)


def _logits(engine: Engine, table: BlockTable, start: int, token_ids: list[int]) -> Tensor:
    part = BatchPart(token_ids=token_ids, start=start, table=table, save_rows=None, wants_logits=True)
    return engine._runner.forward(build_batch([part], 0, engine.loaded.device))


# Interleaved, partial with few channels, one KV head, layers without rotation, several tables, scaled values.
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt-neox", "falcon-mqa", "smollm3", "gemma3", "llama-yarn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_reloaded_is_resident(name: str, dtype: torch.dtype) -> None:
    prompt = random_prompt(45, 1)
    resident = Owner(make_engine(loaded(name, dtype), shuffle=1))
    resident.add("t", prompt, ANSWER)
    table = _run_and_keep_table(resident, "t")
    history = (*prompt, *resident.results["t"].token_ids[:-1])
    assert len(history) == 53

    reloaded = Owner(make_engine(loaded(name, dtype), shuffle=2), resident.store)
    new = list(random_prompt(6, 2))
    reloaded.add("t", (*history, *new), restore=tuple(resident.store.plan((*history, *new), cuts=(53,))), save=False)
    reloaded.engine.step()
    while not reloaded.engine.step():
        pass
    other = reloaded.engine._sequences["t"].table
    for (k, v), (k2, v2) in zip(_pool(resident.engine, table, 53), _pool(reloaded.engine, other, 53), strict=True):
        assert torch.equal(k, k2)
        assert torch.equal(v, v2)
        assert float(k.abs().sum()) > 0
    table.append([block for block in range(resident.engine.config.num_blocks) if block not in table.blocks][:2])
    expected = _logits(resident.engine, table, 53, new)
    assert torch.equal(_logits(reloaded.engine, other, 53, new), expected)
    reloaded.engine.abort("t")
    reloaded.engine.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_a_chunk_extended_after_a_reload_has_the_bits_of_one_computed_at_once(dtype: torch.dtype) -> None:
    """Raw keys of the restored part and of the computed part meet in one slot."""
    prompt = random_prompt(22, 3)
    first = Owner(make_engine(loaded("llama", dtype)))
    first.add("t", prompt, ANSWER)
    tokens = (*prompt, *first.run()["t"].token_ids[:-1])
    tail = first.store.chunks[first.store.plan(tokens)[-1].key][0]
    assert (tail.start, tail.end) == (16, 30)
    second = Owner(make_engine(loaded("llama", dtype)))
    second.add("longer", (*tokens, 5, 6, 7, 8), ANSWER, restore=tuple(first.store.plan(tokens)))
    longer = (*tokens, 5, 6, 7, 8, *second.run()["longer"].token_ids[:-1])
    [(header, data)] = [chunk for chunk in second.store.chunks.values() if chunk[0].start == 16]
    assert header.token_ids == longer[16:32]
    assert (header.start, header.end) == (16, 32)
    old_header, old_data = first.store.chunks[tail.key]
    assert set(old_header.marks) <= set(header.marks)  # so the longer chunk supersedes it
    old, new = read_chunk(old_data), read_chunk(data)
    for layer in range(len(header.layers)):
        for a, b in zip(old.layer(layer), new.layer(layer)):
            assert (a == b[:, :14]).all()


def test_saved_keys_are_raw_and_do_not_depend_on_the_position() -> None:
    """Two turns, one token apart: in the first layer the same token has the same stored key wherever it stands."""
    prompt = random_prompt(16, 4)
    owner = Owner(make_engine(loaded("llama")))
    owner.add("a", prompt, SamplingParams(max_new_tokens=1))
    owner.add("b", (prompt[0], *prompt), SamplingParams(max_new_tokens=1))
    owner.run()
    chunks = [read_chunk(owner.store.chunks[owner.store.plan(p)[0].key][1]) for p in (prompt, (prompt[0], *prompt))]
    (key_a, _), (key_b, _) = (chunk.layer(0) for chunk in chunks)
    torch.testing.assert_close(torch.tensor(key_a[:, :15]), torch.tensor(key_b[:, 1:16]), atol=1e-5, rtol=1e-5)
