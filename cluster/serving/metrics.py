"""Prometheus metrics: what one front process counts, what the cluster's actors say of themselves, and one text of both.

    Metrics           counted here, turn by turn and request by request     -> families with the label `front`
    cluster_families  from the snapshots of scheduler, stores and replicas  -> families of the whole cluster
    merge             the texts of several front processes                  -> one text

Names are the field's where it has one (vLLM's, with our prefix). Labels are tenants, tiers, causes, nodes, replicas and
the like; never a session, a request or a key. docs/metrics.md lists them all. This file asks nobody: figures are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cluster.client import Answer
from policies.messages import Cause, Tier

PREFIX = "reprise"

TTFT_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
E2E_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 600)
QUEUE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600)
RESTORE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


ABORTED = "abort"  # as vLLM calls it


class Metrics:
    """One front process's. Has a registry of its own: several may live in one process."""

    def __init__(self, front_id: str = "0") -> None:
        """`front_id` is the value of the label `front`."""
        self.front_id = front_id
        self._registry = registry = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, labels, namespace=PREFIX, registry=registry)

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, words, namespace=PREFIX, registry=registry, buckets=buckets)

        self._ttft = histogram("time_to_first_token_seconds", "From submission to the first token.", TTFT_S)
        self._itl = histogram("inter_token_latency_seconds", "Gaps between tokens as they arrive.", ITL_S)
        self._e2e = histogram("e2e_request_latency_seconds", "From submission to the last token.", E2E_S)
        self._queue = histogram("request_queue_time_seconds", "Waiting for a replica before the first token.", QUEUE_S)
        self._restore = histogram("request_restore_time_seconds", "Restoring KV, of turns that reuse some.", RESTORE_S)
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a turn.", TOKENS)
        self._answer_sizes = histogram("request_generation_tokens", "Generated tokens of a turn.", TOKENS)
        self._finished = counter("request_success", "Answered turns by how they ended.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Prompt tokens of answered turns.", "tenant")
        self._generated = counter("generation_tokens", "Generated tokens of answered turns.", "tenant")
        self._reused = counter("prompt_tokens_reused", "Prompt tokens whose KV was there, by where it was.", "tier")
        self._recomputed = counter("prompt_tokens_recomputed", "Prompt tokens that were computed, by why.", "cause")
        self._drifts = counter("template_drift", "Turns whose chat template broke their conversation's prefix.")
        self._retries = counter("request_retries", "Further attempts of turns: a replica preempted them or was lost.")
        self._retried = counter("prompt_tokens_retried", "Prompt tokens computed again by further attempts.")
        self._http = counter("http_requests", "HTTP requests that have ended.", "endpoint", "status")
        self._open = Gauge(
            "http_requests_in_progress", "HTTP requests under way.", ("endpoint",), namespace=PREFIX, registry=registry
        )
        for tier in Tier:  # rates need a series before its first increase
            self._reused.labels(tier)
        for cause in Cause:
            self._recomputed.labels(cause)

    def observe_answer(self, answer: Answer, tenant: str) -> None:
        """A turn has ended with an answer."""
        account, num_generated = answer.account, len(answer.tokens)
        if answer.ttft_s is not None:
            self._ttft.observe(answer.ttft_s)
        for gap_s in answer.itl_s:
            self._itl.observe(gap_s)
        self._e2e.observe(answer.end_to_end_s)
        self._queue.observe(answer.queue_wait_s)
        if account.reused:
            self._restore.observe(account.restore_s)
        self._prompt_sizes.observe(account.num_prompt_tokens)
        self._answer_sizes.observe(num_generated)
        self._finished.labels(answer.finish_reason).inc()
        self._prompt.labels(tenant).inc(account.num_prompt_tokens)
        self._generated.labels(tenant).inc(num_generated)
        for tier, num_tokens in account.reused.items():
            self._reused.labels(tier).inc(num_tokens)
        for cause, num_tokens in account.recomputed.items():
            self._recomputed.labels(cause).inc(num_tokens)
        self._drifts.inc(1 if account.recomputed.get(Cause.DRIFT) else 0)
        self._retries.inc(max(0, answer.num_attempts - 1))
        self._retried.inc(answer.retried_tokens)

    def observe_abort(self, num_generated: int, tenant: str) -> None:
        """A turn has ended without an answer: its client went, its time was over, or it failed."""
        self._finished.labels(ABORTED).inc()
        self._generated.labels(tenant).inc(num_generated)

    def request_started(self, endpoint: str) -> None:
        """`endpoint`: one of a few paths; whoever calls folds the others."""
        self._open.labels(endpoint).inc()

    def request_finished(self, endpoint: str, status: str) -> None:
        self._open.labels(endpoint).dec()
        self._http.labels(endpoint, status).inc()

    def own_exposition(self) -> str:
        """Prometheus' text of this process alone, without the label `front`."""
        return _text(self._registry.collect())

    def exposition(
        self,
        scheduler: Mapping[str, Any],
        stores: Sequence[Mapping[str, Any]],
        replicas: Sequence[Mapping[str, Any]],
        others: Mapping[str, str] | None = None,
    ) -> str:
        """Everything: this process, the others' own expositions by their front id, and the cluster."""
        fronts = merge({self.front_id: self.own_exposition(), **(others or {})})
        return fronts + _text(cluster_families(scheduler, stores, replicas))


def merge(expositions: Mapping[str, str]) -> str:
    """One text of the texts of several front processes: families together, each sample with the label `front`."""
    families: dict[str, Metric] = {}
    for front_id, text in expositions.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "front": front_id}, sample.value)
    return _text(families.values())


# --- the cluster ------------------------------------------------------------------------------------------------------

_SCHEDULER = {
    "turns_waiting": ("num_requests_waiting", "Turns that wait for a replica."),
    "turns_running": ("num_requests_running", "Turns given to a replica and not ended."),
    "chunks": ("num_chunks", "Chunks with a copy in DRAM or below."),
    "ghosts": ("num_ghosts", "Chunks that are gone, remembered to name the cause of a miss."),
    "leases": ("num_leases", "Pins on chunks that dispatched turns restore."),
    "offers_pending": ("num_offers_pending", "Computed chunks that wait for bytes in DRAM to be saved."),
    "sessions_expected": ("num_sessions_expected", "Sessions announced to speak soon."),
    "sessions_pinned": ("num_sessions_pinned", "Sessions and prefixes whose chunks are kept until a time."),
    "prefixes_with_lifetimes": (
        "num_prefixes_with_lifetimes",
        "Prefixes and tenants with a time to live of their own.",
    ),
    "prefix_wishes": ("num_prefix_wishes", "What was said about prefixes and is still being done to what is stored."),
    "chunks_deleting": ("num_chunks_deleting", "Chunks of deleted sessions that have not left every tier yet."),
    "replicas": ("num_replicas", "Replicas that take turns."),
    "nodes": ("num_nodes", "Nodes with a store."),
}
_INCOMING = ("num_copies_incoming", "Copies on their way into a tier: saving, fetching, demoting.")
_LEAD = ("fetch_lead_seconds_total", "From a fetched copy's arrival to the first turn that reads it; sum over copies.")
_PLACES = {
    "used_bytes": ("tier_used_bytes", "Bytes of copies in a tier."),
    "reserved_bytes": ("tier_reserved_bytes", "Bytes reserved in a tier for copies that are coming."),
    "budget_bytes": ("tier_budget_bytes", "Bytes a tier may hold."),
}
_COUNTERS = {
    "commands": ("scheduler_commands_total", "command", "Commands: Save, Fetch, Demote, Drop (evict), Decline, ..."),
    "events": ("scheduler_events_total", "event", "Events heard."),
    "stale": ("scheduler_stale_events_total", "event", "Events that came late or twice and changed nothing."),
    "overdue": ("scheduler_overdue_total", "what", "Deadlines that passed: of copies by state, cancels, leases."),
    "dropped": ("chunk_copies_dropped_total", "reason", "Copies that left a tier, by why: evicted, deleted, lost, ..."),
    "fetched": ("fetched_copies_total", "outcome", "Fetched copies that a turn has read, or that left unread."),
    "reused": ("planned_tokens_reused_total", "tier", "Prompt tokens that restore plans load."),
    "recomputed": ("planned_tokens_recomputed_total", "cause", "Prompt tokens that restore plans leave, by why."),
}
_STORE = {
    "used_bytes": ("store_used_bytes", "tier", "Bytes in a tier as its store counts them."),
    "peak_bytes": ("store_peak_bytes", "tier", "The most bytes seen in a tier since the store started."),
    "saved_bytes": ("saved_bytes_total", "", "Bytes saved from replicas into DRAM."),
    "fetched_bytes": ("fetched_bytes_total", "source", "Bytes fetched into DRAM, by the tier they came from."),
    "demoted_bytes": ("demoted_bytes_total", "tier", "Bytes copied down, by the tier they went to."),
    "failed_commands": ("store_failed_commands_total", "", "Commands a store could not carry out."),
    "ray_spilled_bytes": ("ray_spilled_bytes", "", "The most bytes Ray itself spilled; should be 0."),
    "ray_fallback_bytes": ("ray_fallback_bytes", "", "The most bytes Ray put outside of shared memory; should be 0."),
}
_TURNS = ("engine_turns", "Turns in an engine by state.")
_LOAD_RATE = ("load_bytes_per_second", "Recent rate of loads into an engine, by place.")
_REPLICA: dict[str, tuple[str, dict[str, str], str]] = {
    "turns_queued": (_TURNS[0], {"state": "queued"}, _TURNS[1]),
    "turns_restoring": (_TURNS[0], {"state": "restoring"}, _TURNS[1]),
    "turns_running": (_TURNS[0], {"state": "running"}, _TURNS[1]),
    "steps": ("engine_steps_total", {}, "Steps of an engine."),
    "step_s": ("engine_step_seconds", {}, "Recent length of a step."),
    "stalled_s": ("engine_stalled_seconds", {}, "For how long an engine with work has made no step."),
    "prefill_tokens": ("engine_prefill_tokens_total", {}, "Prompt tokens computed."),
    "decode_tokens": ("engine_decode_tokens_total", {}, "Tokens decoded."),
    "prefill_s": ("engine_prefill_seconds_total", {}, "Time of steps, the prompt tokens' share."),
    "decode_s": ("engine_decode_seconds_total", {}, "Time of steps, the decoded tokens' share."),
    "prefill_tokens_per_s": ("engine_prefill_tokens_per_second", {}, "Recent rate of mostly prefilling steps."),
    "decode_tokens_per_s": ("engine_decode_tokens_per_second", {}, "Recent rate of mostly decoding steps."),
    "chunks_kept": ("hbm_chunks_kept", {}, "Chunks of finished turns that stay in HBM."),
    "chunks_kept_evicted": ("hbm_chunks_evicted_total", {}, "Kept chunks whose blocks were needed."),
    "hbm_policy_faults": ("hbm_policy_faults_total", {}, "Faults of the policy that evicts in HBM."),
    "slots": ("write_buffer_slots", {}, "Slots for chunks on their way out of HBM."),
    "slots_free": ("write_buffer_slots_free", {}, "Free slots for chunks on their way out of HBM."),
    "saves_running": ("write_buffer_saves", {}, "Chunks being copied out of HBM."),
    "loads_running": ("restores", {}, "Loads into HBM under way, those of turns that left included."),
    "ready_chunks": ("write_buffer_ready_chunks", {}, "Chunks out of HBM that wait for their store."),
    "ready_bytes": ("write_buffer_ready_bytes", {}, "Bytes of chunks that wait for their store."),
    "ready_dropped": ("write_buffer_dropped_total", {}, "Chunks given up because their store did not come."),
    "turns_not_saved": ("turns_not_saved_total", {}, "Turns not saved, or in part: the write buffer was full."),
}


def cluster_families(
    scheduler: Mapping[str, Any], stores: Sequence[Mapping[str, Any]], replicas: Sequence[Mapping[str, Any]]
) -> list[Metric]:
    """Of the actors' snapshots. What one of them does not say, or who does not answer, is missing."""
    families = _Families()
    _add_scheduler(families, scheduler)
    for stats in stores:
        _add_store(families, stats)
    for stats in replicas:
        _add_replica(families, stats)
    return list(families.by_name.values())


class _Families:
    """Families as they fill. What ends with _total is a counter, everything else a gauge."""

    def __init__(self) -> None:
        self.by_name: dict[str, Metric] = {}

    def add(self, name: str, words: str, value: float, labels: Mapping[str, str]) -> None:
        full_name = f"{PREFIX}_{name}"
        if full_name not in self.by_name:
            kind = "counter" if name.endswith("_total") else "gauge"
            self.by_name[full_name] = Metric(full_name.removesuffix("_total"), words, kind)
        self.by_name[full_name].add_sample(full_name, dict(labels), float(value))


def _add_scheduler(families: _Families, stats: Mapping[str, Any]) -> None:
    for key, (name, words) in _SCHEDULER.items():
        if key in stats:
            families.add(name, words, stats[key], {})
    for place, figures in stats.get("tiers", {}).items():
        node, _, tier = place.rpartition("/")
        for key, (name, words) in _PLACES.items():
            families.add(name, words, figures[key], {"node": node, "tier": tier})
    for node, states in stats.get("incoming", {}).items():
        for state, count in states.items():
            families.add(*_INCOMING, count, {"node": node, "state": state})
    counters = dict(stats.get("counters", {}))
    lead_ms = counters.pop("fetched.lead_ms", None)
    if lead_ms is not None:
        families.add(*_LEAD, lead_ms / 1000, {})
    for counted, value in counters.items():
        kind, _, what = counted.partition(".")
        if kind in _COUNTERS:
            name, label, words = _COUNTERS[kind]
            families.add(name, words, value, {label: what})
    for fault, value in stats.get("policy_faults", {}).items():
        policy, _, verb = fault.rpartition(".")
        families.add("policy_faults_total", "Faults of policies.", value, {"policy": policy, "verb": verb})


def _add_store(families: _Families, stats: Mapping[str, Any]) -> None:
    here = {"node": stats["node_id"]}
    for key, (name, label, words) in _STORE.items():
        if not label:
            families.add(name, words, stats[key], here)
            continue
        for what, value in stats[key].items():
            families.add(name, words, value, {**here, label: str(what)})


def _add_replica(families: _Families, stats: Mapping[str, Any]) -> None:
    here = {"replica": stats["replica_id"]}
    for key, value in stats.items():
        if key in _REPLICA:
            name, labels, words = _REPLICA[key]
            families.add(name, words, value, {**here, **labels})
        elif key.startswith("load_bytes_per_s_"):
            place = key.removeprefix("load_bytes_per_s_")
            families.add(*_LOAD_RATE, value, {**here, "place": place})
    blocks = {state: stats[f"blocks_{state}"] for state in ("free", "kept", "pending")}
    num_used = stats["blocks"] - blocks["free"] - blocks["kept"]
    for state, value in {**blocks, "held": num_used - blocks["pending"]}.items():
        words = "Blocks of the KV pool: free, kept by finished turns, held by running ones, pending on a load or save."
        families.add("hbm_blocks", words, value, {**here, "state": state})
    words = "Share of the KV pool that running turns, loads and saves hold (0 to 1)."
    families.add("kv_cache_usage_perc", words, num_used / max(1, stats["blocks"]), here)


class _Given(Collector):
    """Families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _text(families: Iterable[Metric]) -> str:
    """Without the times at which series began, which OpenMetrics knows and Prometheus' text writes as families."""
    kept = []
    for family in families:
        family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        kept.append(family)
    return generate_latest(_Given(kept)).decode()
