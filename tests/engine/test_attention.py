"""The contract of an attention backend: inherit AttentionContract and give a `backend` fixture."""

from __future__ import annotations

import pytest
import torch

from actors.engine.attention import AttentionBackend, SdpaAttention, Span
from actors.engine.blocks import BlockTable
from actors.engine.hooks import AttentionArgs

BLOCK = 4
SCALE = 0.31


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """One turn in float64, one query and one head at a time. q [t, H, D], k [n, G, D], v [n, G, Dv]."""
    t, num_heads, _ = q.shape
    n, num_groups, _ = k.shape
    out = torch.zeros(t, num_heads, v.shape[-1], dtype=torch.float64)
    for i in range(t):
        at = n - t + i
        first = max(0, at + 1 - args.sliding_window) if args.sliding_window else 0
        for h in range(num_heads):
            g = h // (num_heads // num_groups)
            scores = (k[first : at + 1, g].double() @ q[i, h].double()) * args.scaling
            if args.softcap is not None:
                scores = args.softcap * torch.tanh(scores / args.softcap)
            if args.sinks is not None:
                scores = torch.cat((scores, args.sinks[h : h + 1].double()))
            weights = scores.softmax(-1)[: at + 1 - first]
            out[i, h] = weights @ v[first : at + 1, g].double()
    return out


class AttentionContract:
    """What every backend must do; `tolerance` is for float32."""

    tolerance = 2e-5
    device = "cpu"

    @pytest.fixture
    def backend(self) -> AttentionBackend:
        raise NotImplementedError

    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
    @pytest.mark.parametrize(
        "args",
        [
            AttentionArgs(scaling=SCALE),
            AttentionArgs(scaling=SCALE, sliding_window=5),
            AttentionArgs(scaling=SCALE, softcap=2.0),
            AttentionArgs(scaling=SCALE, softcap=2.0, sliding_window=7),
            AttentionArgs(scaling=SCALE, sinks=torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0, 1.0])),
            AttentionArgs(scaling=SCALE, sinks=torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0, 1.0]), sliding_window=3),
        ],
        ids=["plain", "window", "softcap", "softcap-window", "sinks", "sinks-window"],
    )
    def test_ragged_batch(self, backend: AttentionBackend, heads: tuple[int, int], args: AttentionArgs) -> None:
        num_heads, num_groups = heads
        if args.sinks is not None:
            args = AttentionArgs(
                scaling=SCALE, sliding_window=args.sliding_window, sinks=args.sinks[:num_heads].to(self.device)
            )
        torch.manual_seed(0)
        keys = torch.randn(16, BLOCK, num_groups, 8, device=self.device)
        values = torch.randn(16, BLOCK, num_groups, 12, device=self.device)
        # (new, total, blocks): a first chunk, a later chunk, decodes; neighbours and pages in disorder
        turns = [(6, 6, [9, 3]), (5, 14, [4, 5, 6, 7]), (1, 9, [15, 0, 2]), (1, 1, [1]), (3, 12, [12, 10, 13])]
        spans, start = [], 0
        for new, total, blocks in turns:
            table = BlockTable(BLOCK)
            table.append(blocks)
            spans.append(Span(start, start + new, total, table))
            start += new
        queries = torch.randn(start, num_heads, 8, device=self.device)
        pool_before = keys.clone()
        out = backend.attend(queries, keys, values, spans, args)
        assert out.shape == (start, num_heads, 12)
        assert torch.equal(keys, pool_before)
        cpu_args = AttentionArgs(
            scaling=args.scaling,
            sliding_window=args.sliding_window,
            softcap=args.softcap,
            sinks=None if args.sinks is None else args.sinks.cpu(),
        )
        for span in spans:
            rows = span.table.rows(0, span.num_kv)
            k, v = keys.cpu().flatten(0, 1)[rows], values.cpu().flatten(0, 1)[rows]
            expected = _reference(queries[span.start : span.end].cpu(), k, v, cpu_args)
            got = out[span.start : span.end].cpu().double()
            torch.testing.assert_close(got, expected, atol=self.tolerance, rtol=self.tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_backend_serves_step_after_step(self, backend: AttentionBackend, dtype: torch.dtype) -> None:
        """Nothing that is remembered from one step, layer or window reaches another."""
        torch.manual_seed(1)
        for num_kv, blocks in ((6, [0, 1]), (9, [2, 0, 1]), (12, [2, 0, 1]), (3, [1])):
            table = BlockTable(BLOCK)
            table.append(blocks)
            spans = [Span(0, 3, num_kv, table)]
            for window in (None, 4, None):
                args = AttentionArgs(scaling=SCALE, sliding_window=window)
                q, keys, values = (torch.randn(*shape, device=self.device, dtype=dtype) for shape in
                                   ((3, 4, 8), (3, BLOCK, 2, 8), (3, BLOCK, 2, 8)))  # fmt: skip
                got = backend.attend(q, keys, values, spans, args).cpu().double()
                rows = table.rows(0, num_kv)
                k, v = keys.cpu().flatten(0, 1)[rows], values.cpu().flatten(0, 1)[rows]
                tolerance = self.tolerance if dtype == torch.float32 else 3e-2
                expected = _reference(q.cpu(), k, v, args)
                torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)

    def test_rows_outside_a_span_do_not_matter(self, backend: AttentionBackend) -> None:
        """Pages hold what earlier turns left behind, even infinities."""
        keys = torch.full((3, BLOCK, 2, 8), float("inf"), device=self.device)
        values = torch.full((3, BLOCK, 2, 8), float("nan"), device=self.device)
        table = BlockTable(BLOCK)
        table.append([2, 0])
        rows = table.rows(0, 6)
        keys.flatten(0, 1)[rows.to(self.device)] = torch.randn(6, 2, 8, device=self.device)
        values.flatten(0, 1)[rows.to(self.device)] = torch.randn(6, 2, 8, device=self.device)
        queries = torch.randn(2, 4, 8, device=self.device)
        args = AttentionArgs(scaling=SCALE, sliding_window=3)
        assert bool(backend.attend(queries, keys, values, [Span(0, 2, 6, table)], args).isfinite().all())


class TestSdpaAttention(AttentionContract):
    @pytest.fixture
    def backend(self) -> AttentionBackend:
        return SdpaAttention()


class TestSdpaAttentionInSmallTiles(AttentionContract):
    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
        monkeypatch.setattr("actors.engine.attention._TILE_QUERIES", 2)
        return SdpaAttention()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestSdpaAttentionOnCuda(AttentionContract):
    device = "cuda"
    tolerance = 2e-4

    @pytest.fixture
    def backend(self) -> AttentionBackend:
        return SdpaAttention()
