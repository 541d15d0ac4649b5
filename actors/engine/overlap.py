"""Load or compute: how a restore is ordered, what is computed while it runs, and when its turn may join a step.

Pure: numbers in, decisions out. Two orders:

    LAYERS   layer after layer over all chunks; the turn joins a step as soon as no layer will be late for it
             (layer-wise pre-loading with a read buffer; CachedAttention, section 3.2.1)
    TAIL     chunk after chunk from the last one to the first, while the engine computes from the first token on;
             the two meet after T_compute * T_load / (T_compute + T_load) (Cake, ICML 2025)

Rates are seconds per token or per byte, measured; None while they are unknown.
"""

from __future__ import annotations

from enum import StrEnum

MIN_FRONT_TOKENS = 16
"""Fewer tokens than this are not worth a step of their own: the load is nearly there."""
STALL_SHARE = 0.02
"""A joined step may be that much longer for a layer that is late."""


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


def front_tokens(gap: int, load_s_per_token: float, compute_s_per_token: float | None) -> int:
    """How many of the `gap` tokens between what is computed and what is loaded the next step should compute.

    As many as there will be when the two meet, if both go on at their rates; 0: wait for the load.
    """
    if compute_s_per_token is None or load_s_per_token <= 0:
        return 0
    wanted = int(gap * load_s_per_token / (load_s_per_token + compute_s_per_token))
    return wanted if wanted >= MIN_FRONT_TOKENS else 0


def may_join(num_ready: int, num_layers: int, layer_load_s: float, layer_compute_s: float) -> bool:
    """Whether a step that begins now finds every layer in place when it comes to it.

    Layer i is wanted i * layer_compute_s from now and there in (i + 1 - num_ready) * layer_load_s; as both grow evenly,
    the next layer and the last one decide. num_ready layers are the paper's read buffer
    S_buf = B * (T_load * L_hist - T_pref * L_new): the slower the load, the more of them.
    """
    slack_s = STALL_SHARE * num_layers * layer_compute_s
    next_late_s = layer_load_s - num_ready * layer_compute_s
    last_late_s = (num_layers - num_ready) * layer_load_s - (num_layers - 1) * layer_compute_s
    return num_ready >= num_layers or max(next_late_s, last_late_s) <= slack_s
