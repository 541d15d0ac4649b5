"""Products with few rows, turned around: the same numbers, the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.engine.linear import FewRowsLinear, speed_up_few_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (2, 12), (1, 7, 12), (3, 1, 12), (1, 65, 12), (12,)])
def test_results_are_those_of_a_plain_linear(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(12, 20, bias=bias)
    turned = FewRowsLinear(12, 20, bias=bias)
    turned.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    for num_threads in (2, 1):
        torch.set_num_threads(num_threads)  # 1 in all other tests
        got = turned(x)
        torch.testing.assert_close(got, plain(x))
        assert got.is_contiguous()


@pytest.mark.parametrize("has_mkl", [True, False])
def test_only_plain_big_float32_layers_on_a_cpu_with_mkl_are_changed(
    monkeypatch: pytest.MonkeyPatch, has_mkl: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr("actors.engine.linear._MIN_ELEMENTS", 16)

    class Own(nn.Linear):
        pass

    layers = (nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, device="meta"), nn.Linear(4, 3))
    model = nn.Sequential(*layers)
    names = list(model.state_dict())
    speed_up_few_rows(model)
    first = FewRowsLinear if has_mkl else nn.Linear
    assert [type(layer) for layer in model] == [first, Own, nn.Linear, nn.Linear, nn.Linear]
    assert list(model.state_dict()) == names
