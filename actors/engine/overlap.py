"""Load or compute: how a restore is ordered, what is computed while it runs, and when its turn may join a step.

Pure: numbers in, decisions out. Two orders:

    LAYERS   layer after layer over all chunks; the turn joins a step as soon as no layer will be late for it
             (layer-wise pre-loading with a read buffer; CachedAttention, section 3.2.1)
    TAIL     chunk after chunk from the last one to the first, while the engine computes from the first token on;
             the two meet after T_compute * T_load / (T_compute + T_load) (Cake, ICML 2025)

Rates are seconds per token or per byte, measured; None while they are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_FRONT_TOKENS = 16
"""A step of fewer tokens takes as long as one of so many."""
STALL_SHARE = 0.05
"""A joined step may be that much longer for a layer that is late: else this turn waits for a whole step more."""


class LoadOrder(StrEnum):
    LAYERS = "layers"
    TAIL = "tail"


def choose_order(load_s: float | None, history_s: float, new_s: float) -> LoadOrder:
    """The order in which the turn is done sooner.

    `load_s`: to load all that can be restored; `history_s`: to compute it instead; `new_s`: to compute the rest.
    Layers: loading hides behind computing the rest, up to `new_s` of it. Tail: loading and computing share the work.
    An unknown place is loaded from the tail: that never takes longer than loading it all, and measures it.
    """
    if load_s is None:
        return LoadOrder.TAIL
    shared_s = load_s * history_s / (load_s + history_s) if load_s > 0 else 0.0
    exposed_s = max(0.0, load_s - new_s)
    return LoadOrder.TAIL if shared_s < exposed_s else LoadOrder.LAYERS


@dataclass(frozen=True, slots=True, kw_only=True)
class TailLoad:
    """How far a load from the tail is, in tokens and seconds."""

    frontier: int
    """From here on everything is in place."""
    gap_end: int
    """Up to here it may still be computed: the frontier, or the beginning of a chunk that is being written."""
    starts: Sequence[int]
    """First token of every chunk below the frontier, ascending. The last of them is under way."""
    s_per_token: float
    under_way_s: float
    """Since the frontier moved."""

    def seconds_to(self, token: int) -> float:
        """Until everything from `token` on is there: whole chunks."""
        if token >= self.frontier:
            return 0.0
        first = max((start for start in self.starts if start <= token), default=token)
        return max(0.0, (self.frontier - first) * self.s_per_token - self.under_way_s)


def front_tokens(computed: int, load: TailLoad, compute_s_per_token: float | None) -> int:
    """How many tokens behind the `computed` ones to compute while the load comes to meet them; 0: wait for it.

    Chunks come whole, so the two meet at the beginning of one: where whoever is later is there soonest.
    """
    if compute_s_per_token is None:
        return 0
    best, best_s = computed, load.seconds_to(computed)
    for end in (*load.starts, load.frontier):
        if computed < end <= load.gap_end:
            compute_s = max(end - computed, MIN_FRONT_TOKENS) * compute_s_per_token
            met_s = max(compute_s, load.seconds_to(end))
            if met_s < best_s:
                best, best_s = end, met_s
    return best - computed


def may_join(
    num_ready: int,
    num_layers: int,
    layer_load_s: float,
    layer_compute_s: float,
    *,
    first_in_s: float | None = None,
    spare_s: float = 0.0,
) -> bool:
    """Whether a step that begins now finds every layer in place when it comes to it.

    Layer i is wanted i * layer_compute_s from now and there in (i + 1 - num_ready) * layer_load_s; as both grow evenly,
    the next layer and the last one decide. num_ready layers are the paper's read buffer
    S_buf = B * (T_load * L_hist - T_pref * L_new): the slower the load, the more of them.
    `first_in_s`: when the next layer is there, if not after layer_load_s. `spare_s`: how late layers may be besides.
    """
    first_in_s = layer_load_s if first_in_s is None else first_in_s
    slack_s = STALL_SHARE * num_layers * layer_compute_s + spare_s
    next_late_s = first_in_s - num_ready * layer_compute_s
    last_late_s = first_in_s + (num_layers - num_ready - 1) * layer_load_s - (num_layers - 1) * layer_compute_s
    return num_ready >= num_layers or max(next_late_s, last_late_s) <= slack_s
