"""Requests and tokens per minute, and requests at a time, under a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.quotas import WAIT_FOR_ONE_S, Admission, QuotaExceeded, Quotas
from cluster.serving.tenants import EVERYBODY, Tenant

ALICE = Tenant(name="alice", max_concurrent=3, requests_per_minute=6, tokens_per_minute=100)
SLACK = 1e-6


def test_at_most_so_many_at_a_time() -> None:
    quotas = Quotas()
    admissions = [quotas.enter(ALICE, 1, 1, 0.0) for _ in range(3)]
    with pytest.raises(QuotaExceeded, match="3 of your requests are running") as refused:
        quotas.enter(ALICE, 1, 1, 0.0)
    assert refused.value.retry_after_s == WAIT_FOR_ONE_S
    quotas.leave(admissions[1], 2, 0.0)
    quotas.enter(ALICE, 1, 1, 0.0)
    assert quotas.num_running(ALICE) == 3


def test_requests_per_minute() -> None:
    quotas = Quotas()
    for _ in range(6):
        quotas.leave(quotas.enter(ALICE, 1, 1, 0.0), 2, 0.0)
    with pytest.raises(QuotaExceeded, match="6 requests a minute") as refused:
        quotas.enter(ALICE, 1, 1, 4.0)
    assert refused.value.retry_after_s == pytest.approx(6.0)
    quotas.enter(ALICE, 1, 1, 10.0)


def test_tokens_are_held_while_a_request_runs_and_only_those_used_are_taken() -> None:
    quotas = Quotas()
    admission = quotas.enter(ALICE, 30, 50, 0.0)
    assert quotas.num_held(ALICE) == 80
    with pytest.raises(QuotaExceeded, match="100 tokens a minute") as refused:
        quotas.enter(ALICE, 20, 10, 0.0)
    assert refused.value.retry_after_s == pytest.approx(6.0)  # 10 of 100 a minute are missing
    quotas.leave(admission, 35, 0.0)
    assert quotas.num_held(ALICE) == 0
    quotas.enter(ALICE, 20, 45, 0.0)  # 65 are left
    with pytest.raises(QuotaExceeded):
        quotas.enter(ALICE, 1, 0, 0.0)


def test_more_used_than_held_delays_what_comes_later() -> None:
    quotas = Quotas()
    quotas.leave(quotas.enter(ALICE, 10, 10, 0.0), 130, 0.0)
    with pytest.raises(QuotaExceeded) as refused:
        quotas.enter(ALICE, 10, 10, 0.0)
    assert refused.value.retry_after_s == pytest.approx(30.0)


def test_a_request_that_never_fits_is_told_so() -> None:
    with pytest.raises(QuotaExceeded, match="101 tokens together, more than the 100") as refused:
        Quotas().enter(ALICE, 1, 100, 0.0)
    assert refused.value.retry_after_s is None


def test_a_refused_request_counts_nothing() -> None:
    quotas = Quotas()
    for _ in range(20):
        with pytest.raises(QuotaExceeded):
            quotas.enter(ALICE, 101, 0, 0.0)
    assert (quotas.num_running(ALICE), quotas.num_held(ALICE)) == (0, 0)
    for _ in range(3):
        quotas.enter(ALICE, 30, 0, 0.0)


def test_tenants_do_not_see_each_other() -> None:
    quotas = Quotas()
    quotas.enter(ALICE, 100, 0, 0.0)
    quotas.enter(replace(ALICE, name="bob"), 100, 0, 0.0)


def test_no_limits_no_refusal() -> None:
    quotas = Quotas()
    for _ in range(1000):
        quotas.enter(EVERYBODY, 10**6, 10**6, 0.0)
    assert quotas.num_running(EVERYBODY) == 1000


def test_changed_limits_hold_from_the_next_request_on() -> None:
    quotas = Quotas()
    first = quotas.enter(replace(ALICE, tokens_per_minute=None), 10**6, 0, 0.0)
    quotas.leave(first, 10**6, 0.0)
    quotas.leave(quotas.enter(ALICE, 100, 0, 0.0), 100, 0.0)
    with pytest.raises(QuotaExceeded):
        quotas.enter(ALICE, 100, 0, 30.0)
    quotas.leave(quotas.enter(replace(ALICE, tokens_per_minute=10), 10, 0, 30.0), 10, 30.0)
    with pytest.raises(QuotaExceeded):
        quotas.enter(replace(ALICE, tokens_per_minute=1000), 30, 0, 31.0)
    quotas.enter(replace(ALICE, tokens_per_minute=1000), 30, 0, 33.0)


def test_a_lowered_limit_leaves_no_more_than_its_own_burst() -> None:
    quotas = Quotas()
    quotas.leave(quotas.enter(replace(ALICE, requests_per_minute=600), 1, 0, 0.0), 1, 0.0)
    for _ in range(6):
        quotas.leave(quotas.enter(ALICE, 1, 0, 0.0), 1, 0.0)
    with pytest.raises(QuotaExceeded):
        quotas.enter(ALICE, 1, 0, 0.0)


def test_time_that_runs_backwards_gives_nothing() -> None:
    quotas = Quotas()
    quotas.leave(quotas.enter(ALICE, 100, 0, 60.0), 100, 60.0)
    for now in (0.0, 59.0):
        with pytest.raises(QuotaExceeded):
            quotas.enter(ALICE, 10, 0, now)
    with pytest.raises(QuotaExceeded):
        quotas.enter(ALICE, 1, 0, 60.0)


def test_nobody_leaves_twice() -> None:
    quotas = Quotas()
    admission = quotas.enter(ALICE, 1, 1, 0.0)
    quotas.enter(ALICE, 1, 1, 0.0)
    quotas.leave(admission, 1, 0.0)
    with pytest.raises(KeyError):
        quotas.leave(admission, 1, 0.0)


# --- whatever comes ---------------------------------------------------------------------------------------------------

step = st.tuples(
    st.floats(0, 40), st.integers(0, 60), st.integers(0, 60), st.floats(0, 1), st.booleans(), st.integers(0, 5)
)


@given(st.lists(step, max_size=60))
def test_no_window_has_more_than_rate_and_burst(steps: list[tuple[float, int, int, float, bool, int]]) -> None:
    quotas, now = Quotas(), 0.0
    running: list[Admission] = []
    entered: list[tuple[float, int]] = []
    used: list[tuple[float, int]] = []

    def leave(admission: Admission, share: float) -> None:
        used.append((now, round(admission.num_tokens * share)))
        quotas.leave(admission, used[-1][1], now)

    for wait_s, num_prompt, num_new, share, is_leaving, which in steps:
        now += wait_s
        if is_leaving and running:
            leave(running.pop(which % len(running)), share)
            continue
        try:
            running.append(quotas.enter(ALICE, num_prompt, num_new, now))
            entered.append((now, 1))
        except QuotaExceeded:
            pass
        assert quotas.num_running(ALICE) == len(running) <= 3
        assert quotas.num_held(ALICE) == sum(admission.num_tokens for admission in running)
    for admission in running:
        leave(admission, 1.0)
    assert (quotas.num_running(ALICE), quotas.num_held(ALICE)) == (0, 0)
    for happened, per_minute in ((entered, 6), (used, 100)):
        for i, (begin, _) in enumerate(happened):
            for j in range(i, len(happened)):
                most = per_minute * (1 + (happened[j][0] - begin) / 60)
                assert sum(amount for _, amount in happened[i : j + 1]) <= most + SLACK


@given(st.lists(step, max_size=30), st.integers(0, 50), st.integers(0, 50))
def test_who_waits_as_long_as_told_gets_in(
    steps: list[tuple[float, int, int, float, bool, int]], num_prompt: int, num_new: int
) -> None:
    """With nothing running, so that nobody has to be waited for."""
    quotas, now = Quotas(), 0.0
    for wait_s, num_before, num_new_before, share, _, _ in steps:
        now += wait_s
        try:
            admission = quotas.enter(ALICE, num_before, num_new_before, now)
        except QuotaExceeded:
            continue
        quotas.leave(admission, round(admission.num_tokens * share), now)
    for _ in range(3):  # requests, then tokens
        try:
            quotas.enter(ALICE, num_prompt, num_new, now)
            return
        except QuotaExceeded as refused:
            now += (refused.retry_after_s or 0.0) + SLACK
    pytest.fail("it was told to wait again and again")
