"""What machines and models can do, in the few figures the simulator needs. Named ones, or your own.

Named figures are data sheets times an efficiency, not measurements: `measured.py` takes those of `reprise bench`. Knows
nothing of time passing; `engine.py` and `links.py` turn rates into durations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


class SetupError(ValueError):
    """A set-up that cannot be; the message says which figure and what to do."""


MAX_RATE = 1e15
"""Bytes per second, more than anything has."""


def require_positive(what: object, names: Iterable[str], advice: str, highest: float = math.inf) -> None:
    """SetupError unless these attributes are finite numbers above 0, and not above the highest."""
    _require(what, names, advice, lambda value: 0 < value <= highest)


def require_not_negative(what: object, names: Iterable[str], advice: str) -> None:
    """SetupError unless these attributes are finite numbers of 0 or more."""
    _require(what, names, advice, lambda value: value >= 0)


def require_whole(what: object, names: Iterable[str], advice: str) -> None:
    """SetupError unless these attributes are whole numbers of 1 or more."""
    _require(what, names, advice, lambda value: value >= 1 and value == int(value))


def _require(what: object, names: Iterable[str], advice: str, is_good: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(what, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and is_good(value)):
            raise SetupError(f"{type(what).__name__}.{name} is {value!r}: {advice}")


@dataclass(frozen=True, kw_only=True)
class LinkSpeeds:
    """Bytes per second of each way that KV takes, and seconds until the first byte comes."""

    dram_load: float
    """DRAM to HBM, of one replica (all its GPUs together)."""
    dram_save: float
    """HBM to DRAM, of one replica."""
    ssd_read: float
    """Of one node, like all below. SSD faster than DRAM is odd, but allowed."""
    ssd_write: float
    network: float
    """From other nodes; each node receives at this rate."""
    object_read: float
    object_write: float
    ssd_latency_s: float = 1e-4
    network_latency_s: float = 1e-3
    object_latency_s: float = 0.03

    def __post_init__(self) -> None:
        rates = ("dram_load", "dram_save", "ssd_read", "ssd_write", "network", "object_read", "object_write")
        require_positive(self, rates, "give bytes per second above 0, for example 26e9", highest=MAX_RATE)
        latencies = ("ssd_latency_s", "network_latency_s", "object_latency_s")
        require_not_negative(self, latencies, "give seconds, 0 or more")


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """How long one replica computes. A step holds one token of every turn that decodes, and prefill in what is left."""

    prefill_s_per_token: float
    prefill_s_per_token_and_context: float = 0.0
    """What each token before a token adds: attention grows with the context."""
    step_s: float = 0.0
    """A step in which one or more turns decode: reading the weights, launching kernels."""
    step_s_per_turn: float = 0.0
    step_s_per_context_token: float = 0.0
    """Reading the KV of the turns that decode."""
    max_step_tokens: int = 2048
    kv_tokens: int = 100_000
    """Capacity of the block pool."""

    def __post_init__(self) -> None:
        require_positive(self, ("prefill_s_per_token",), "give seconds above 0, for example 1e-4 (10,000 tokens/s)")
        require_whole(self, ("max_step_tokens", "kv_tokens"), "give a whole number of tokens above 0")
        costs = (
            "prefill_s_per_token_and_context",
            "step_s",
            "step_s_per_turn",
            "step_s_per_context_token",
        )
        require_not_negative(self, costs, "give seconds, 0 or more")
        if self.step_s + self.step_s_per_turn <= 0:
            raise SetupError("a decode step takes no time: give EngineSpeed.step_s or step_s_per_turn above 0")

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds of computing the tokens [start, end) of a prompt, alone."""
        attended = (end * end - start * start) / 2
        return (end - start) * self.prefill_s_per_token + attended * self.prefill_s_per_token_and_context

    def decode_step_s(self, num_turns: int, num_context_tokens: float) -> float:
        """Seconds of one step for so many turns, which attend to so many tokens together."""
        return self.step_s + num_turns * self.step_s_per_turn + num_context_tokens * self.step_s_per_context_token


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder in 16 bits."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    kv_size: int
    """Width of one token's keys in one layer: KV heads times head size."""

    def __post_init__(self) -> None:
        names = ("num_parameters", "num_layers", "hidden_size", "kv_size")
        require_positive(self, names, "see the model's config.json")

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.num_layers * self.kv_size

    @property
    def weight_bytes(self) -> float:
        return 2 * self.num_parameters


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of GPU and the links of a machine that has it."""

    name: str
    flops: float
    """Of one GPU: dense, 16 bits."""
    hbm_bytes_per_s: float
    hbm_bytes: float
    links: LinkSpeeds
    flops_efficiency: float = 0.55
    hbm_efficiency: float = 0.7
    step_overhead_s: float = 0.002
    kv_share: float = 0.9
    """Share of HBM for weights and KV; the rest is for activations."""
    facts: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        rates = ("flops", "hbm_bytes_per_s", "hbm_bytes")
        require_positive(self, rates, "see the GPU's data sheet")
        shares = ("flops_efficiency", "hbm_efficiency", "kv_share")
        require_positive(self, shares, "give a share above 0, up to 1")
        for name in shares:
            if getattr(self, name) > 1:
                raise SetupError(f"Machine.{name} is {getattr(self, name)}: give a share above 0, up to 1")
        require_not_negative(self, ("step_overhead_s",), "give seconds, 0 or more")

    def engine(self, model: Model, num_gpus: int, max_step_tokens: int = 2048) -> EngineSpeed:
        """The speed of one replica on so many of these GPUs (perfect scaling). SetupError if the model does not fit."""
        if num_gpus < 1:
            raise SetupError(f"a replica on {num_gpus} GPUs: give 1 or more")
        flops = num_gpus * self.flops * self.flops_efficiency
        bytes_per_s = num_gpus * self.hbm_bytes_per_s * self.hbm_efficiency
        kv_bytes = num_gpus * self.hbm_bytes * self.kv_share - model.weight_bytes
        kv_tokens = int(kv_bytes / model.kv_bytes_per_token)
        if kv_tokens < 1:
            raise SetupError(
                f"{model.name} ({model.weight_bytes / 1e9:.0f} GB) does not fit {num_gpus} x {self.name}: "
                "take more GPUs per replica or a smaller model"
            )
        return EngineSpeed(
            prefill_s_per_token=2 * model.num_parameters / flops,
            prefill_s_per_token_and_context=4 * model.num_layers * model.hidden_size / flops,
            step_s=self.step_overhead_s + model.weight_bytes / bytes_per_s,
            step_s_per_turn=2 * model.num_parameters / flops,
            step_s_per_context_token=model.kv_bytes_per_token / bytes_per_s,
            max_step_tokens=max_step_tokens,
            kv_tokens=kv_tokens,
        )


def _links(pcie: float, ssd_read: float, ssd_write: float, network: float) -> LinkSpeeds:
    return LinkSpeeds(
        dram_load=pcie,
        dram_save=pcie,
        ssd_read=ssd_read,
        ssd_write=ssd_write,
        network=network,
        object_read=2.5e9,
        object_write=2.5e9,
    )


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="a100",
            flops=312e12,
            hbm_bytes_per_s=2.04e12,
            hbm_bytes=80e9,
            links=_links(26e9, 5e9, 3e9, 12e9),
            facts="A100-SXM-80G, PCIe 4 as measured in the paper (26 GB/s), one NVMe drive, 100 Gb/s, S3",
        ),
        Machine(
            name="h100",
            flops=989e12,
            hbm_bytes_per_s=3.35e12,
            hbm_bytes=80e9,
            links=_links(52e9, 12e9, 6e9, 40e9),
            facts="H100-SXM-80G, PCIe 5, two NVMe drives, 400 Gb/s, S3",
        ),
        Machine(
            name="h200",
            flops=989e12,
            hbm_bytes_per_s=4.8e12,
            hbm_bytes=141e9,
            links=_links(52e9, 12e9, 6e9, 40e9),
            facts="H200-SXM-141G, PCIe 5, two NVMe drives, 400 Gb/s, S3",
        ),
        Machine(
            name="l4",
            flops=121e12,
            hbm_bytes_per_s=0.3e12,
            hbm_bytes=24e9,
            links=_links(24e9, 3e9, 1.5e9, 3e9),
            facts="L4-24G, PCIe 4, one NVMe drive, 25 Gb/s, S3",
        ),
    )
}

MODELS = {
    model.name: model
    for model in (
        Model(name="llama-2-13b", num_parameters=13.0e9, num_layers=40, hidden_size=5120, kv_size=5120),
        Model(name="llama-1-65b", num_parameters=65.2e9, num_layers=80, hidden_size=8192, kv_size=8192),
        Model(name="llama-2-70b", num_parameters=69.0e9, num_layers=80, hidden_size=8192, kv_size=1024),
        Model(name="falcon-40b", num_parameters=41.8e9, num_layers=60, hidden_size=8192, kv_size=512),
        Model(name="llama-3-8b", num_parameters=8.0e9, num_layers=32, hidden_size=4096, kv_size=1024),
        Model(name="llama-3-70b", num_parameters=70.6e9, num_layers=80, hidden_size=8192, kv_size=1024),
        Model(name="qwen2.5-7b", num_parameters=7.6e9, num_layers=28, hidden_size=3584, kv_size=512),
    )
}


def machine_named(name: str) -> Machine:
    """SetupError for a name that is not in MACHINES."""
    return _named(MACHINES, name, "machine")


def model_named(name: str) -> Model:
    """SetupError for a name that is not in MODELS."""
    return _named(MODELS, name, "model")


def _named(known: dict[str, T], name: str, kind: str) -> T:
    if name not in known:
        raise SetupError(f"no {kind} {name!r}: choose from {', '.join(known)}, or make a {kind.title()} of your own")
    return known[name]
