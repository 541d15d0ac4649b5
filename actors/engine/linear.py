"""Matrix products with few rows, as decode steps of several turns have them: turned around where that is faster.

With MKL on a CPU, float32 and several threads, x Wᵀ with 2 to 64 rows takes 1.2 to 2.5 times as long as (W xᵀ)ᵀ, the
same numbers up to rounding: measured with 768 to 32,000 columns on an AMD EPYC, two threads; most with 2 to 16 rows.
MKL shares the usual form out badly among threads: on one thread there is little between the two. One row is a
matrix-vector product either way, and from some hundred rows on the usual form wins. Small matrices gain less than the
detour costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_ROWS = 64
_MIN_ELEMENTS = 1 << 18  # of the weight


class FewRowsLinear(nn.Linear):
    """An nn.Linear that turns products with few rows around."""

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // self.in_features
        if not 1 < num_rows <= _MAX_ROWS or torch.get_num_threads() == 1:
            return F.linear(x, self.weight, self.bias)
        product = torch.mm(self.weight, x.reshape(num_rows, -1).t()).t().contiguous()
        if self.bias is not None:
            product += self.bias
        return product.view(*x.shape[:-1], -1)


def speed_up_few_rows(model: nn.Module) -> None:
    """Changes the linear layers of a model in place, where it pays; parameters and their names stay as they are."""
    if torch.backends.mkl.is_available():
        for module in model.modules():
            if type(module) is nn.Linear and _gains(module.weight):
                module.__class__ = FewRowsLinear


def _gains(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _MIN_ELEMENTS
