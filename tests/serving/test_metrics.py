"""What Prometheus is told, the page that lists it, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from actors.engine.loading import LoadedModel
from actors.engine.params import SampledToken
from actors.engine.turns import FinishReason
from actors.node_store import Traffic
from actors.wire import TurnAccount
from cluster.client import Answer
from cluster.serving.metrics import Metrics, cluster_families, merge
from policies import messages as m
from policies.scheduler import Scheduler
from tests.engine.harness import make_engine

ROOT = Path(__file__).resolve().parents[2]
SESSION, TURN = "session-of-somebody", "turn-of-somebody"

# --- what the actors say ----------------------------------------------------------------------------------------------

NOT_SHOWN = {"policy_fault_texts", "fleet", "recording"}  # of the scheduler: words, lists and the recorder's state
COMMANDS = ("Dispatch", "Save", "Decline", "Fetch", "Demote", "Drop", "Cancel")


def scheduler_stats() -> dict[str, Any]:
    """A real one's, with counters of every kind."""
    scheduler = Scheduler(m.SchedulerConfig())
    tiers = tuple(m.TierSpec(tier=tier, budget_bytes=1000) for tier in (m.Tier.DRAM, m.Tier.SSD, m.Tier.OBJECT))
    scheduler.handle(m.NodeJoined(node_id="node-a", tiers=tiers), 0.0)
    found = scheduler.snapshot()
    found["counters"] |= {f"commands.{command}": 4 for command in COMMANDS}
    found["counters"] |= {f"reused.{tier}": 5 for tier in m.Tier} | {f"recomputed.{cause}": 6 for cause in m.Cause}
    found["counters"] |= {"dropped.evicted": 3, "fetched.used": 2, "fetched.unused": 1, "fetched.lead_ms": 1500}
    found["counters"] |= {"stale.copy": 7, "overdue.saving": 8, "overdue.lease": 9, "of_a_later_version.x": 1}
    found["policy_faults"] = {"Returns.order": 2}
    found["incoming"] = {"node-a": {"saving": 1, "fetching": 2, "demoting": 3}}
    return found


def store_stats(node_id: str) -> dict[str, Any]:
    traffic = Traffic(
        saved_bytes=11,
        fetched_bytes={m.Tier.SSD: 12},
        demoted_bytes={m.Tier.SSD: 13, m.Tier.OBJECT: 14},
        failed_commands=15,
        peak_bytes={m.Tier.DRAM: 16},
        ray_spilled_bytes=17,
        ray_fallback_bytes=18,
    )
    return {"node_id": node_id, "used_bytes": {"dram": 19}, "budget_bytes": {"dram": 1000}, **asdict(traffic)}


ENGINE_KEYS = [
    "steps",
    "step_s",
    "prefill_tokens",
    "decode_tokens",
    "prefill_s",
    "decode_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "turns_queued",
    "turns_restoring",
    "turns_running",
    "chunks_kept",
    "chunks_kept_evicted",
    "slots",
    "slots_free",
    "saves_running",
    "loads_running",
    "turns_not_saved",
    "ready_chunks",
    "ready_bytes",
    "ready_dropped",
]
BLOCK_KEYS = {"blocks", "blocks_free", "blocks_kept", "blocks_pending"}


def replica_stats(replica_id: str) -> dict[str, Any]:
    return {
        "replica_id": replica_id,
        "pid": 1,
        "hbm_policy_faults": 3,
        "stalled_s": 0.75,
        **{key: 100 + i for i, key in enumerate(ENGINE_KEYS)},
        "blocks": 40,
        "blocks_free": 10,
        "blocks_kept": 20,
        "blocks_pending": 4,
        "load_bytes_per_s_dram": 5e9,
    }


def answer(**fields: Any) -> Answer:
    account = TurnAccount(
        reused={m.Tier.DRAM: 60, m.Tier.SSD: 30}, recomputed={m.Cause.NEVER_STORED: 7, m.Cause.DRIFT: 3}, restore_s=0.02
    )
    values: dict[str, Any] = {
        "tokens": [SampledToken(token_id=i) for i in range(4)],
        "finish_reason": FinishReason.STOP,
        "account": account,
        "num_attempts": 1,
        "queue_wait_s": 0.3,
        "ttft_s": 0.06,
        "end_to_end_s": 1.2,
        "itl_s": [0.01, 0.02, 0.4],
    }
    return Answer(turn_id=TURN, **{**values, **fields})


def used_metrics(front_id: str = "0", tenant: str = "alice") -> Metrics:
    metrics = Metrics(front_id)
    metrics.observe_answer(answer(), tenant)
    metrics.request_started("/v1/chat/completions")
    metrics.request_finished("/v1/chat/completions", "200")
    return metrics


def exposition() -> str:
    return used_metrics().exposition(
        scheduler_stats(),
        [store_stats("node-a"), store_stats("node-b")],
        [replica_stats("replica-0"), replica_stats("replica-1")],
        {"1": used_metrics().own_exposition()},
    )


# --- reading ----------------------------------------------------------------------------------------------------------

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families_of(text: str) -> dict[str, Metric]:
    """By name as exposed. Stricter than the parser: no family twice, no series twice, everything has words."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name not in found, f"{name} comes twice"
        assert family.documentation, f"{name} has no words"
        assert family.type in ("counter", "gauge", "histogram")
        found[name] = family
    series = [(sample.name, frozenset(sample.labels.items())) for f in found.values() for sample in f.samples]
    assert [key for key, count in Counter(series).items() if count > 1] == []
    return found


def series_of(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families_of(text).values()
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return series_of(text)[f"reprise_{name}", frozenset(labels.items())]


# --- turns and requests -----------------------------------------------------------------------------------------------


def test_an_answer_is_counted() -> None:
    metrics = Metrics()
    metrics.observe_answer(answer(), "alice")
    metrics.observe_answer(answer(num_attempts=3, retried_tokens=40), "bob")
    text = metrics.own_exposition()
    assert value(text, "prompt_tokens_total", tenant="bob") == 100
    assert value(text, "generation_tokens_total", tenant="alice") == 4
    assert value(text, "prompt_tokens_reused_total", tier="ssd") == 60
    assert value(text, "prompt_tokens_recomputed_total", cause="never_stored") == 14
    assert value(text, "request_success_total", finished_reason="stop") == 2
    assert value(text, "template_drift_total") == 2
    assert value(text, "request_retries_total") == 2
    assert value(text, "prompt_tokens_retried_total") == 40
    assert value(text, "time_to_first_token_seconds_sum") == pytest.approx(0.12)
    assert value(text, "time_to_first_token_seconds_bucket", le="0.075") == 2
    assert value(text, "time_to_first_token_seconds_bucket", le="0.05") == 0
    assert value(text, "inter_token_latency_seconds_count") == 6
    assert value(text, "e2e_request_latency_seconds_sum") == pytest.approx(2.4)
    assert value(text, "request_queue_time_seconds_sum") == pytest.approx(0.6)
    assert value(text, "request_restore_time_seconds_sum") == pytest.approx(0.04)


def test_an_answer_without_reuse_or_tokens_has_no_such_times() -> None:
    metrics = Metrics()
    account = TurnAccount(recomputed={m.Cause.EVICTED: 5})
    metrics.observe_answer(answer(account=account, tokens=[], ttft_s=None, itl_s=[]), "alice")
    text = metrics.own_exposition()
    assert value(text, "e2e_request_latency_seconds_count") == 1
    for name in ("request_restore_time", "time_to_first_token", "inter_token_latency"):
        assert value(text, f"{name}_seconds_count") == 0


def test_series_by_tier_and_cause_are_there_before_the_first_turn() -> None:
    series = series_of(Metrics().own_exposition())
    for tier in m.Tier:
        assert series["reprise_prompt_tokens_reused_total", frozenset({("tier", str(tier))})] == 0
    for cause in m.Cause:
        assert series["reprise_prompt_tokens_recomputed_total", frozenset({("cause", str(cause))})] == 0


def test_requests_are_counted_by_endpoint_and_status() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.request_started("/health")
    metrics.request_finished("/health", "503")
    text = metrics.own_exposition()
    assert value(text, "http_requests_in_progress", endpoint="/health") == 2
    assert value(text, "http_requests_total", endpoint="/health", status="503") == 1


def test_processes_do_not_share_state() -> None:
    used_metrics()
    assert value(Metrics().own_exposition(), "e2e_request_latency_seconds_count") == 0


# --- the cluster ------------------------------------------------------------------------------------------------------


def test_every_figure_of_the_scheduler_is_shown() -> None:
    real = set(Scheduler(m.SchedulerConfig()).snapshot())
    stats = {key: 1000 + i for i, key in enumerate(sorted(real)) if key not in NOT_SHOWN}
    for key in ("tiers", "counters", "policy_faults", "incoming"):
        stats.pop(key)
    shown = {sample.value for family in cluster_families(stats, [], []) for sample in family.samples}
    assert [key for key, figure in stats.items() if figure not in shown] == []


def test_tiers_counters_and_faults_of_the_scheduler() -> None:
    text = exposition()
    assert value(text, "tier_budget_bytes", node="node-a", tier="ssd") == 1000
    assert value(text, "tier_used_bytes", node="shared", tier="object") == 0
    assert value(text, "tier_reserved_bytes", node="node-a", tier="dram") == 0
    assert value(text, "scheduler_commands_total", command="Drop") == 4
    assert value(text, "scheduler_events_total", event="NodeJoined") == 1
    assert value(text, "planned_tokens_reused_total", tier="hbm") == 5
    assert value(text, "planned_tokens_recomputed_total", cause="late") == 6
    assert value(text, "scheduler_stale_events_total", event="copy") == 7
    assert value(text, "scheduler_overdue_total", what="lease") == 9
    assert value(text, "policy_faults_total", policy="Returns", verb="order") == 2
    assert value(text, "num_nodes") == 1


def test_every_figure_of_a_store_is_shown() -> None:
    stats = store_stats("node-b")
    families = cluster_families({}, [stats], [])
    shown = {sample.value for family in families for sample in family.samples}
    assert shown == set(range(11, 20))  # the budget is the scheduler's to say
    assert all(sample.labels["node"] == "node-b" for family in families for sample in family.samples)


def test_every_figure_of_an_engine_is_shown(small_model: Path) -> None:
    engine = make_engine(LoadedModel.load(str(small_model), dtype="float32"))
    try:
        real = engine.stats().keys()
    finally:
        engine.close()
    assert real - {"stalled_s"} == {*ENGINE_KEYS, *BLOCK_KEYS}
    text = Metrics().exposition({}, [], [replica_stats("replica-1")])
    shown = {figure for (_, labels), figure in series_of(text).items() if ("replica", "replica-1") in labels}
    assert {100 + i for i in range(len(ENGINE_KEYS))} <= shown
    assert {3, 0.75, 5e9} <= shown


def test_blocks_of_the_kv_pool_add_up() -> None:
    text = exposition()
    states = ("free", "kept", "held", "pending")
    shown = {state: value(text, "hbm_blocks", replica="replica-0", state=state) for state in states}
    assert shown == {"free": 10, "kept": 20, "held": 6, "pending": 4}
    assert value(text, "kv_cache_usage_perc", replica="replica-0") == 0.25


def test_what_does_not_answer_is_missing() -> None:
    assert cluster_families({}, [], []) == []
    names = families_of(Metrics().exposition({}, [], [])).keys()
    assert "reprise_http_requests_total" in names
    assert not any(name.startswith(("reprise_tier", "reprise_engine", "reprise_num")) for name in names)


def test_labels_are_few_and_name_nobody() -> None:
    text = exposition()
    assert SESSION not in text
    assert TURN not in text
    labels = {name for _, pairs in series_of(text) for name, _ in pairs}
    assert labels == {
        "front",
        "tenant",
        "tier",
        "cause",
        "reason",
        "outcome",
        "finished_reason",
        "endpoint",
        "status",
        "le",
        "node",
        "replica",
        "state",
        "place",
        "source",
        "command",
        "event",
        "what",
        "policy",
        "verb",
    }


# --- several processes ------------------------------------------------------------------------------------------------


def test_merged_texts_keep_every_series_under_its_front() -> None:
    parts = {"a": used_metrics(tenant="alice").own_exposition(), "b": used_metrics(tenant="bob").own_exposition()}
    merged = series_of(merge(parts))
    expected = {
        (name, labels | {("front", front)}): figure
        for front, text in parts.items()
        for (name, labels), figure in series_of(text).items()
    }
    assert merged == expected
    assert merged["reprise_prompt_tokens_total", frozenset({("front", "b"), ("tenant", "bob")})] == 100


def test_merged_families_keep_type_words_and_the_order_of_buckets() -> None:
    text = used_metrics().own_exposition()
    before, after = families_of(text), families_of(merge({"a": text, "b": text}))
    assert [(f.name, f.type, f.documentation) for f in before.values()] == [
        (f.name, f.type, f.documentation) for f in after.values()
    ]
    buckets = [s for s in after["reprise_time_to_first_token_seconds"].samples if s.name.endswith("_bucket")]
    bounds = [float(sample.labels["le"]) for sample in buckets if sample.labels["front"] == "b"]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")


def test_one_text_has_every_front_and_the_cluster_once() -> None:
    others = {"1": used_metrics().own_exposition(), "2": Metrics().own_exposition()}
    series = series_of(used_metrics("0").exposition(scheduler_stats(), [], [], others))
    turns = {
        dict(labels)["front"]: figure
        for (name, labels), figure in series.items()
        if name.endswith("e2e_request_latency_seconds_count")
    }
    assert turns == {"0": 1, "1": 1, "2": 0}
    assert series["reprise_num_nodes", frozenset()] == 1


def test_nothing_to_merge() -> None:
    assert merge({}) == ""
    assert merge({"a": ""}) == ""


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3, unique=True))
def test_whatever_a_tenant_is_called_its_tokens_survive_merging(tenants: list[str]) -> None:
    metrics = Metrics()
    for tenant in tenants:
        metrics.observe_answer(answer(), tenant)
    lines = merge({"f": metrics.own_exposition()}).split("\n")
    assert sum(line.startswith("reprise_generation_tokens_total{") for line in lines) == len(tenants)
    assert all(line.startswith(("#", "reprise_")) for line in lines[:-1])


# --- the page ---------------------------------------------------------------------------------------------------------


def table_rows(families: dict[str, Metric]) -> list[str]:
    """As docs/metrics.md has them."""
    rows = []
    for name, family in families.items():
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |")
    return rows


def test_the_page_lists_every_metric_and_no_other() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    listed = [line for line in page.splitlines() if line.startswith("| `reprise_")]
    text = exposition()
    assert sorted(listed) == sorted(table_rows(families_of(text)))
    examples = page[page.index("## Reading them") :]
    assert set(re.findall(r"reprise_\w+", examples)) <= {name for name, _ in series_of(text)}


# --- the dashboard ----------------------------------------------------------------------------------------------------

DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "reprise.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]


def test_the_dashboard_is_one_that_grafana_10_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 38
    assert (DASHBOARD["id"], bool(DASHBOARD["uid"]), bool(DASHBOARD["title"])) == (None, True, True)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_panels_lie_in_rows_and_nothing_overlaps() -> None:
    titles = [row["title"] for row in ROWS]
    assert titles == [
        "Latency",
        "Tokens by source",
        "Why tokens were computed",
        "Tiers",
        "Queue and prefetch",
        "Evictions",
        "Bandwidth",
        "Engines and HTTP",
    ]
    cells: Counter[tuple[int, int]] = Counter()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
    assert max(cells.values()) == 1
    kinds = "".join("r" if panel["type"] == "row" else "p" for panel in DASHBOARD["panels"])
    assert re.fullmatch(r"(rp+)+", kinds)
    heights = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert heights == sorted(heights)


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{title}-{t['refId']}" for title, t in TARGETS])
def test_what_a_panel_asks_for_exists(title: str, target: dict[str, Any]) -> None:
    """Its metrics, the labels it groups and names by, and the values it selects."""
    known: dict[str, dict[str, set[str]]] = {}
    for name, pairs in series_of(exposition()):
        labels = known.setdefault(name, {})
        for label, what in pairs:
            labels.setdefault(label, set()).add(what)
    expression = target["expr"]
    assert expression.count("(") == expression.count(")")
    names = re.findall(r"reprise_\w+", expression)
    assert names
    assert [name for name in names if name not in known] == []
    shown = re.findall(r"reprise_\w+", re.sub(r" / scalar \(.*", "", expression))  # a divisor without labels
    labels = set.intersection(*(set(known[name]) for name in shown))
    grouped = {
        label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.replace(" ", "").split(",")
    }
    assert grouped <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= (grouped if grouped else labels)
    for name, selectors in re.findall(r"(reprise_\w+)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)[=!]~?"([^"]*)"', selectors):
            assert set(values.split("|")) <= known[name][label]


def test_the_dashboard_shows_what_it_is_for() -> None:
    shown = {name for _, target in TARGETS for name in re.findall(r"reprise_\w+", target["expr"])}
    assert shown >= {
        "reprise_time_to_first_token_seconds_bucket",
        "reprise_prompt_tokens_reused_total",
        "reprise_prompt_tokens_recomputed_total",
        "reprise_tier_used_bytes",
        "reprise_num_requests_waiting",
        "reprise_scheduler_commands_total",
        "reprise_fetched_bytes_total",
    }
