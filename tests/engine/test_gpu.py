"""One model on CUDA against stock transformers on the CPU: tokens, restore, and equal bits after a reload."""

from __future__ import annotations

import pytest
import torch

from actors.engine.loading import LoadedModel
from tests.engine.harness import Owner, make_engine
from tests.engine.models import CONFIGS, build, random_prompt, stock_answer

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
