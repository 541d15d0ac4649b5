"""Pairing, rotating and the tables behind it, against the textbook formula in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actors.engine.hooks import IdentityRotary, rotary_identity, wrap_rotary
from actors.engine.rope import PairLayout, PhaseTable, Rotation, module_phases, row_parts
from tests.engine.models import LONGROPE, build, loaded


def _inverse_frequencies(d: int) -> torch.Tensor:
    return 1.0 / 10000.0 ** (torch.arange(0, d, 2, dtype=torch.float32) / d)


class PlainRotary(nn.Module):
    """cos and sin [1, T, d], both halves alike, like Llama's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(d))
        self.attention_scaling = 1.5

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        both = torch.cat((angles, angles), -1)
        return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling


class OpaqueRotary(PlainRotary):
    """The same, but its frequencies are not where the engine looks for them."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.hidden, self.inv_freq = self.inv_freq, None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.hidden
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()


def _rotation(kind: str, place: str, d: int, head_dim: int) -> Rotation:
    table = PhaseTable(IdentityRotary(PlainRotary(d), None), None, "first_half")
    return Rotation(PairLayout(kind=kind, place=place, rotary_dim=d, head_dim=head_dim), table)  # type: ignore[arg-type]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that set torch's number of threads."""
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "place", "d", "head_dim"), [
    ("half", "leading", 16, 16),
    ("half", "leading", 4, 16),
    ("half", "trailing", 16, 24),
    ("interleaved", "leading", 16, 16),
    ("interleaved", "leading", 8, 16),
    ("interleaved", "trailing", 6, 10),
])  # fmt: skip
def test_rotation_is_the_textbook_one(kind: str, place: str, d: int, head_dim: int) -> None:
    rotation = _rotation(kind, place, d, head_dim)
    positions = torch.tensor([0, 1, 7, 300])
    x = torch.randn(4, 2, head_dim)
    got = rotation.rotate(rotation.pair(x), rotation.phases(positions, 301))
    first = 0 if place == "leading" else head_dim - d
    expected = x.double().clone()
    for i, theta in enumerate(_inverse_frequencies(d).double()):
        a, b = (first + i, first + i + d // 2) if kind == "half" else (first + 2 * i, first + 2 * i + 1)
        cos, sin = (positions.double() * theta).cos()[:, None] * 1.5, (positions.double() * theta).sin()[:, None] * 1.5
        expected[..., a] = x[..., a] * cos - x[..., b] * sin
        expected[..., b] = x[..., a] * sin + x[..., b] * cos
    torch.testing.assert_close(got.double(), expected[..., rotation.layout.permutation()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("d", "heads"), [(4, 1), (16, 1), (16, 3), (128, 1), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("restored_threads")
def test_bits_do_not_depend_on_shape_or_threads(d: int, heads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    rotation = _rotation("half", "leading", d, d)
    x = torch.randn(1501, heads, d).to(dtype)
    phases = rotation.phases(torch.arange(1501), 1501)
    whole = rotation.rotate(x, phases)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert torch.equal(whole, rotation.rotate(x, phases))
    torch.set_num_threads(3)
    pieces = [rotation.rotate(x[i : i + 7], phases[i : i + 7]) for i in range(0, 1501, 7)]
    head_major = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole, rotation.rotate(head_major, phases))
    for source in (x, head_major):
        pool = torch.zeros(heads, 2000, d, dtype=dtype).transpose(0, 1)
        rotation.rotate_into(pool[300:1801], source, phases)
        assert torch.equal(whole, pool[300:1801])
        assert not pool[:300].any()
        assert not pool[1801:].any()


@given(
    num_rows=st.integers(0, 20_000),
    row_size=st.integers(1, 80).map(lambda n: 8 * n) | st.sampled_from([1, 12, 4_096]),
    num_threads=st.integers(1, 64),
)
def test_threads_split_parts_between_rows(num_rows: int, row_size: int, num_threads: int) -> None:
    parts = list(row_parts(num_rows, row_size, num_threads))
    assert sum(parts) == num_rows
    for size in parts:
        num_elements = size * row_size
        num_runs = min(num_threads, -(-num_elements // 32_768))  # as at::parallel_for does
        assert size > 0
        assert num_elements <= 262_144
        assert num_runs == 1 or -(-num_elements // num_runs) % row_size == 0
    if num_threads == 1 and row_size <= 640:
        assert len(parts) <= 1 + num_rows * row_size // 200_000, "a call costs as much as many rows"


@pytest.mark.parametrize(("kind", "place", "d", "head_dim"), [
    ("half", "leading", 16, 21),
    ("interleaved", "leading", 6, 7),
    ("half", "trailing", 16, 24),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_into_a_slice_copies_the_rest(
    kind: str, place: str, d: int, head_dim: int, dtype: torch.dtype
) -> None:
    rotation = _rotation(kind, place, d, head_dim)
    x = torch.randn(5, 2, head_dim).to(dtype)
    phases = rotation.phases(torch.arange(5), 5)
    pool = torch.zeros(2, 9, head_dim, dtype=dtype).transpose(0, 1)
    rotation.rotate_into(pool[3:8], x, phases)
    assert torch.equal(pool[3:8], rotation.rotate(x, phases))
    assert torch.equal(pool[3:8, :, d:], x[..., d:])
    assert not pool[:3].any()


def test_rotating_leaves_the_raw_keys_alone() -> None:
    rotation = _rotation("interleaved", "leading", 16, 16)
    x = torch.randn(5, 2, 16)
    before = x.clone()
    rotation.rotate(rotation.pair(x), rotation.phases(torch.arange(5), 5))
    assert torch.equal(x, before)


def test_far_positions_have_exact_angles() -> None:
    table = PhaseTable(IdentityRotary(PlainRotary(64), None), None, "first_half")
    position = 130_001
    angles = [position * float(theta) for theta in _inverse_frequencies(64)]
    expected = torch.tensor([1.5 * complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex64)
    torch.testing.assert_close(table.upto(position + 1)[position], expected, atol=1e-6, rtol=1e-6)


def test_a_grown_table_keeps_its_beginning() -> None:
    table = PhaseTable(IdentityRotary(PlainRotary(16), None), None, "first_half")
    short = table.upto(10)[:10].clone()
    assert table.upto(5000).shape[0] >= 5000
    assert torch.equal(table.upto(10)[:10], short)


def test_a_table_of_unknown_origin_is_taken_from_the_model() -> None:
    rotary = IdentityRotary(OpaqueRotary(16), None)
    table = PhaseTable(rotary, None, "first_half")
    own = module_phases(rotary, None, torch.arange(600), "first_half")
    assert own is not None
    table.upto(3)
    assert torch.equal(table.upto(600)[:600], own)


def test_identity_rotary_gives_ones_and_zeros_and_can_step_aside() -> None:
    model = nn.Module()
    model.rotary = PlainRotary(8)
    rotaries = wrap_rotary(model, 99)
    assert wrap_rotary(model, 99) == rotaries
    positions = torch.arange(6)[None]
    cos, sin = model.rotary(torch.zeros(1), positions)
    assert bool((cos == 1).all())
    assert bool((sin == 0).all())
    with rotary_identity(rotaries, False):
        cos, _ = model.rotary(torch.zeros(1), positions)
    assert float(cos[0, 1, 0]) == pytest.approx(1.5 * math.cos(1.0))
    assert torch.equal(model.rotary.inv_freq, _inverse_frequencies(8))


def test_a_models_own_rotation_costs_nothing_where_it_would_turn_by_nothing() -> None:
    from transformers.models.llama import modeling_llama

    rotary = loaded("llama").model.model.rotary_emb
    dim = 2 * len(rotary.inv_freq)
    q, k = torch.randn(1, 4, 6, dim), torch.randn(1, 2, 6, dim)
    cos, sin = rotary(q, torch.arange(6)[None])
    same = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert same[0] is q
    assert same[1] is k
    stock = modeling_llama.LlamaRotaryEmbedding(loaded("llama").model.config)  # as another model of this process has it
    turned = modeling_llama.apply_rotary_pos_emb(q, k, *stock(q, torch.arange(6)[None]))
    assert torch.equal(turned[0][:, :, 0], q[:, :, 0])
    assert not torch.equal(turned[0][:, :, 1:], q[:, :, 1:])
    plain = modeling_llama.apply_rotary_pos_emb(q, k, cos.clone(), sin.clone())  # without the mark, the long way
    assert torch.equal(plain[0], q)


def test_longrope_has_one_rotation_per_position() -> None:
    model = build(LONGROPE())
    [rotary] = wrap_rotary(model, 255)
    near = module_phases(rotary, None, torch.arange(8), "first_half")
    far = module_phases(rotary, None, torch.arange(200), "first_half")
    assert near is not None
    assert far is not None
    assert torch.equal(near, far[:8])


def test_layers_that_rotate_alike_share_their_table() -> None:
    gemma = loaded("gemma3").rotations
    assert gemma[0] is gemma[2]
    assert gemma[1] is gemma[3]
    assert gemma[0] is not gemma[1]
    smollm = loaded("smollm3").rotations
    assert [rotation is None for rotation in smollm].count(True) == 2
