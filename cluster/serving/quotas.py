"""How much a tenant may ask for: requests and tokens per minute, and requests at a time. The clock is an argument.

    enter: counts the request; holds prompt + max_new_tokens           available = level - held
    leave: gives back what is held, takes from the level what was used

A level grows by the limit per minute, up to one minute's worth: in any window of t seconds a tenant's requests, by
when they enter, and its tokens, by when their requests leave, are at most limit * (1 + t / 60). What is held is only
set aside, so tokens that were wanted and not generated cost nothing.

These are the counts of one front process; of several, each allows so much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.serving.tenants import Tenant

WAIT_FOR_ONE_S = 1.0
"""Retry-After of a tenant all of whose places are taken: when one ends is not known."""


class QuotaExceeded(Exception):  # noqa: N818 - named like the event
    """Not now. `retry_after_s` is None for a request that is larger than the tenant's limit: it will never fit."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Admission:
    """A request that was let in, until it leaves."""

    tenant: Tenant
    num_tokens: int
    """Held for it."""


@dataclass(slots=True)
class Bucket:
    """A token bucket of one minute's worth."""

    per_minute: float  # inf: no limit
    filled_at: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def fill(self, now: float) -> None:
        """Up to now; time that runs backwards stands still."""
        passed_s, self.filled_at = max(0.0, now - self.filled_at), max(self.filled_at, now)
        if math.isfinite(self.per_minute):
            self.level = min(self.per_minute, self.level + passed_s * self.per_minute / 60)

    def set_limit(self, per_minute: float) -> None:
        """For a filled bucket: the keys file may have changed."""
        self.per_minute, self.level = per_minute, min(self.level, per_minute)

    def wait_s(self, amount: float) -> float:
        """How long until the level is so high; 0 if it is. For a filled bucket."""
        return 0.0 if self.level >= amount else (amount - self.level) * 60 / self.per_minute


@dataclass(slots=True)
class _Usage:
    """One tenant's."""

    requests: Bucket
    tokens: Bucket
    admissions: set[Admission] = field(default_factory=set)
    num_held: int = 0


class Quotas:
    """All tenants', by name."""

    def __init__(self) -> None:
        self._usages: dict[str, _Usage] = {}

    def check(self, tenant: Tenant, now: float) -> None:
        """Raises QuotaExceeded if no request, however short, may enter now: known before its prompt is."""
        _check_requests(self._usage(tenant, now), tenant)

    def enter(self, tenant: Tenant, num_prompt_tokens: int, max_new_tokens: int, now: float) -> Admission:
        """Lets the request in; `leave` must follow. Raises QuotaExceeded, which counts nothing."""
        usage = self._usage(tenant, now)
        admission = Admission(tenant=tenant, num_tokens=num_prompt_tokens + max_new_tokens)
        _check_requests(usage, tenant)
        _check_tokens(usage, admission)
        usage.requests.level -= 1
        usage.num_held += admission.num_tokens
        usage.admissions.add(admission)
        return admission

    def leave(self, admission: Admission, num_tokens_used: int, now: float) -> None:
        """The request has ended. More used than held is taken all the same: later requests wait for it."""
        usage = self._usages[admission.tenant.name]
        usage.admissions.remove(admission)
        usage.num_held -= admission.num_tokens
        usage.tokens.fill(now)
        usage.tokens.level -= num_tokens_used

    def num_running(self, tenant: Tenant) -> int:
        return len(self._usages[tenant.name].admissions) if tenant.name in self._usages else 0

    def num_held(self, tenant: Tenant) -> int:
        """Tokens that its running requests may still use."""
        return self._usages[tenant.name].num_held if tenant.name in self._usages else 0

    def _usage(self, tenant: Tenant, now: float) -> _Usage:
        requests, tokens = _limit(tenant.requests_per_minute), _limit(tenant.tokens_per_minute)
        usage = self._usages.get(tenant.name)
        if usage is None:
            usage = self._usages[tenant.name] = _Usage(Bucket(requests, now), Bucket(tokens, now))
        for bucket, limit in ((usage.requests, requests), (usage.tokens, tokens)):
            bucket.fill(now)
            bucket.set_limit(limit)
        return usage


def _check_requests(usage: _Usage, tenant: Tenant) -> None:
    if tenant.max_concurrent is not None and len(usage.admissions) >= tenant.max_concurrent:
        raise QuotaExceeded(
            f"{tenant.max_concurrent} of your requests are running, as many as may at a time: wait for one to end",
            WAIT_FOR_ONE_S,
        )
    wait_s = usage.requests.wait_s(1)
    if wait_s > 0:
        raise QuotaExceeded(f"you may send {tenant.requests_per_minute} requests a minute: wait {wait_s:.1f} s", wait_s)


def _check_tokens(usage: _Usage, admission: Admission) -> None:
    tenant, num_tokens = admission.tenant, admission.num_tokens
    if num_tokens > usage.tokens.per_minute:
        raise QuotaExceeded(
            f"the prompt and the longest answer asked for have {num_tokens} tokens together, more than the "
            f"{tenant.tokens_per_minute} you may use in a minute: shorten the prompt or lower max_tokens",
            None,
        )
    wait_s = usage.tokens.wait_s(usage.num_held + num_tokens)
    if wait_s > 0:
        raise QuotaExceeded(
            f"you may use {tenant.tokens_per_minute} tokens a minute, and this request may need {num_tokens}: "
            f"wait {wait_s:.1f} s or lower max_tokens",
            wait_s,
        )


def _limit(per_minute: int | None) -> float:
    return math.inf if per_minute is None else float(per_minute)
