"""Rotary position embedding as one thing: a permutation of channels and a complex multiply.

Keys and queries are brought into paired order (the two channels of a rotary pair adjacent, the channels that do not
rotate behind them); the same permutation on both leaves every score as it was. In that order the rotation by position p
is a multiply by phase(p), a complex number per pair, done in float32. The store and the block pool use this order.

Shapes: T tokens, H heads, D head dim, d rotary dim (even, d <= D).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, local
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.engine.hooks import IdentityRotary

_MIN_TABLE = 256
_PARALLEL_FROM = 32_768  # torch splits an elementwise operation among threads from this many elements on
_SCRATCH_ELEMENTS = 524_288  # 2 MiB of float32 for each thread that rotates 16-bit floats: they stay in its cache
_SIMD_LANES = 8  # complex64 numbers in the widest vector register


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLayout:
    """Which channels of a head rotate, and which two are a pair."""

    kind: Literal["half", "interleaved"]
    """half: channel i pairs with i + d/2; interleaved: 2i with 2i + 1."""
    place: Literal["leading", "trailing"]
    rotary_dim: int
    head_dim: int

    def permutation(self) -> list[int]:
        """The raw channel at each place of the paired order."""
        d = self.rotary_dim
        first = 0 if self.place == "leading" else self.head_dim - d
        if self.kind == "half":
            pairs = [first + i // 2 + (i % 2) * (d // 2) for i in range(d)]
        else:
            pairs = list(range(first, first + d))
        return pairs + [i for i in range(self.head_dim) if not first <= i < first + d]


PhaseForm = Literal["first_half", "every_second", "as_is"]
"""How a model writes its table: [cos, cos] side by side, every value twice, or one value per pair."""


def module_phases(rotary: IdentityRotary, layer_type: str | None, positions: Tensor, form: PhaseForm) -> Tensor | None:
    """The model's own table at `positions` [T] as complex64 [T, d/2] on the CPU; None where it is not of that form."""
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=positions.device)
    out = rotary.true_rotation(x, positions[None], *(() if layer_type is None else (layer_type,)))
    if torch.is_tensor(out):
        cos, sin = out.real, out.imag
    else:
        cos, sin = out
    cos, sin = (part.reshape(-1, part.shape[-1]).float().cpu() for part in (cos, sin))
    if cos.shape[0] != positions.shape[0]:
        return None
    if form != "as_is":
        if cos.shape[-1] % 2:
            return None
        keep = slice(0, cos.shape[-1] // 2) if form == "first_half" else slice(0, None, 2)
        cos, sin = cos[:, keep], sin[:, keep]
    return torch.complex(cos.contiguous(), sin.contiguous())


def layer_types(rotary: IdentityRotary) -> list[str | None]:
    """The kinds of layer a rotary module has a table for; [None] where it has only one."""
    original: Any = rotary.original
    if "layer_type" not in inspect.signature(original.forward).parameters:
        return [None]
    known = getattr(original, "layer_types", None) or list(getattr(original, "rope_type", None) or ())
    return [kind for kind in known if hasattr(original, f"{kind}_inv_freq")] or [None]


class PhaseTable:
    """Phases of the positions 0, 1, 2, …, grown when a longer prefix is asked for. Safe to use from several threads.

    Angles are computed in float64 from the model's inverse frequencies (float32 angles drift beyond about 10,000
    tokens), after checking that this reproduces the model's own table; where it does not, that table is used.
    """

    def __init__(self, rotary: IdentityRotary, layer_type: str | None, form: PhaseForm) -> None:
        self._rotary, self._layer_type, self._form = rotary, layer_type, form
        self._device = next((b.device for b in rotary.original.buffers()), torch.device("cpu"))
        self._inv_freq: Tensor | None = None
        self._scale = 1.0
        self._find_frequencies(rotary.original, f"{layer_type}_" if layer_type else "")
        self._table = torch.empty(0, 0, dtype=torch.complex64)
        self._lock = Lock()

    def _find_frequencies(self, original: nn.Module, prefix: str) -> None:
        positions = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 34], device=self._device)
        own = module_phases(self._rotary, self._layer_type, positions, self._form)  # also pins length-dependent ones
        inv_freq = getattr(original, f"{prefix}inv_freq", None)
        scale = getattr(original, f"{prefix}attention_scaling", getattr(original, "attention_scaling", 1.0))
        if own is None or not torch.is_tensor(inv_freq) or inv_freq.shape != own.shape[1:]:
            return
        exact = _exact_phases(positions.cpu(), inv_freq.double().cpu(), float(scale))
        if torch.allclose(torch.view_as_real(exact), torch.view_as_real(own), atol=1e-4):
            self._inv_freq, self._scale = inv_freq.double().cpu(), float(scale)

    def upto(self, num_positions: int) -> Tensor:
        """complex64 [>= num_positions, d/2] on the model's device; row p is the phase of position p."""
        if self._table.shape[0] < num_positions:
            with self._lock:
                if self._table.shape[0] < num_positions:
                    self._grow(max(num_positions, 2 * self._table.shape[0], _MIN_TABLE))
        return self._table

    def _grow(self, num_positions: int) -> None:
        old = self._table.shape[0]
        positions = torch.arange(old, num_positions)
        if self._inv_freq is not None:
            more = _exact_phases(positions, self._inv_freq, self._scale)
        else:
            own = module_phases(self._rotary, self._layer_type, positions.to(self._device), self._form)
            assert own is not None, "the probe has seen this table in this form"
            more = own
        more = more.to(self._device)
        self._table = more if old == 0 else torch.cat((self._table, more))


def _exact_phases(positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    angles = positions.double()[:, None] * inv_freq[None]
    return torch.complex((angles.cos() * scale).float(), (angles.sin() * scale).float())


class Rotation:
    """How one layer rotates: its channel layout and its phases."""

    def __init__(self, layout: PairLayout, table: PhaseTable, device: torch.device | str = "cpu") -> None:
        self.layout, self.table = layout, table
        order = layout.permutation()
        self._order = None if order == list(range(layout.head_dim)) else torch.tensor(order, device=device)

    def pair(self, x: Tensor) -> Tensor:
        """[..., D] in the model's channel order -> paired order (the same tensor where the two are equal)."""
        if self._order is None:
            return x
        if self.layout.kind == "half" and self.layout.rotary_dim == self.layout.head_dim:
            return x.view(*x.shape[:-1], 2, -1).transpose(-1, -2).reshape(x.shape)
        return x.index_select(-1, self._order)

    def phases(self, positions: Tensor, num_positions: int) -> Tensor:
        """Phases [T, d/2] of `positions` [T], all below `num_positions`."""
        return self.table.upto(num_positions).index_select(0, positions)

    def rotate(self, x: Tensor, phases: Tensor) -> Tensor:
        """Paired x [T, H, D] by phases [T, d/2]: a new tensor of x's type."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.rotate_into(out, x, phases)
        return out

    def rotate_into(self, out: Tensor, x: Tensor, phases: Tensor) -> None:
        """Like `rotate`, into `out` [T, H, D]: of x's type, any strides (a slice of the pool), x or apart from it.

        The arithmetic is float32. The result of one element does not depend on the shape or strides it was computed
        with or on the number of threads: a key that is loaded and rotated has the same bits as one that was rotated
        when it was computed.
        """
        d = self.layout.rotary_dim
        if d == self.layout.head_dim:
            _rotate_pairs(out, x, phases)
        else:
            _rotate_pairs(out[..., :d], x[..., :d], phases)
            if out is not x:
                out[..., d:].copy_(x[..., d:])

    def multiplies_in_place(self, out: Tensor) -> bool:
        """Whether `rotate_into` writes to this `out` in one pass, without a detour through float32."""
        return _has_complex_view(out[..., : self.layout.rotary_dim])


def _rotate_pairs(out: Tensor, x: Tensor, phases: Tensor) -> None:
    """Paired x [T, H, d] by complex64 phases [T, d/2] into `out`, in parts on a CPU.

    torch's complex multiply rounds differently (fused or not) in vector registers and in the scalar rest of a loop, and
    where the rest falls depends on how threads split the work. On a CPU it is therefore given parts that threads split
    between rows, and rows of whole registers; rows that do not fill registers take real arithmetic.
    """
    factors = phases.unsqueeze(1)
    if x.device.type != "cpu":
        _multiply(out, x, factors)
        return
    row_size = x.shape[1] * phases.shape[-1]
    multiply = _multiply_real if phases.shape[-1] % _SIMD_LANES else _multiply
    start = 0
    for num_rows in row_parts(x.shape[0], row_size, torch.get_num_threads()):
        part = slice(start, start + num_rows)
        multiply(out[part], x[part], factors[part])
        start += num_rows


def row_parts(num_rows: int, row_size: int, num_threads: int) -> Iterator[int]:
    """Sizes of parts, together `num_rows`, which torch gives to one thread each or splits between rows.

    It uses as many threads as there are full or begun runs of _PARALLEL_FROM elements, but not more than it has, and
    gives each the same count. Parts are as large as the scratch buffer: a call costs as much as many rows.
    """
    most = max(1, _SCRATCH_ELEMENTS // (2 * row_size))
    while num_rows:
        size = min(num_rows, most)
        if num_threads > 1 and size * row_size >= _PARALLEL_FROM:
            split = size - size % num_threads
            uses_all_threads = split * row_size > (num_threads - 1) * _PARALLEL_FROM
            size = split if split and uses_all_threads else max(1, (_PARALLEL_FROM - 1) // row_size)
        yield size
        num_rows -= size


def _multiply(out: Tensor, x: Tensor, factors: Tensor) -> None:
    """x [T, H, d] by complex64 factors [T, 1, d/2], by torch's complex multiply."""
    if _has_complex_view(x) and _has_complex_view(out):
        torch.mul(_as_complex(x), factors, out=_as_complex(out))
    else:
        turned = _scratch_like(x).copy_(x)
        _as_complex(turned).mul_(factors)
        out.copy_(turned)


class _Scratch(local):
    """Memory that stays: pages of a fresh buffer cost more than the multiply."""

    def __init__(self) -> None:
        with torch.inference_mode(mode=False):
            self.buffer = torch.empty(_SCRATCH_ELEMENTS, dtype=torch.float32)


_SCRATCH = _Scratch()


def _scratch_like(x: Tensor) -> Tensor:
    """float32 of x's shape [T, H, d], in x's order where it is dense: long runs of neighbours. Until the next call."""
    if x.device.type != "cpu" or x.numel() > _SCRATCH_ELEMENTS:
        return torch.empty_like(x, dtype=torch.float32)
    flat = _SCRATCH.buffer[: x.numel()]
    num_tokens, num_heads, dim = x.shape
    if x.stride(0) < x.stride(1):
        return flat.view(num_heads, num_tokens, dim).transpose(0, 1)
    return flat.view(x.shape)


def _multiply_real(out: Tensor, x: Tensor, factors: Tensor) -> None:
    """The same by products and sums of float32, which round alike everywhere."""
    real, imag = x[..., 0::2].float(), x[..., 1::2].float()
    turned = real * factors.real - imag * factors.imag, real * factors.imag + imag * factors.real
    out[..., 0::2], out[..., 1::2] = turned


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _has_complex_view(x: Tensor) -> bool:
    if x.dtype != torch.float32 or x.storage_offset() % 2:
        return False
    return x.is_contiguous() or (x.stride(-1) == 1 and all(stride % 2 == 0 for stride in x.stride()[:-1]))
