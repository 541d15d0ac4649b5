"""A turn over several attempts, as the client puts it together: nothing twice, nothing lost."""

from __future__ import annotations

import pytest

from actors.engine.params import SampledToken, SamplingParams
from actors.engine.turns import FinishReason
from actors.wire import Delta, Started, TurnAccount, TurnEnd, TurnRequest
from cluster.client import MAX_ATTEMPTS, TurnFailed, _Progress
from policies.messages import Cause, Tier

REQUEST = TurnRequest(turn_id="t", session_id="s", token_ids=(1, 2, 3), sampling=SamplingParams(max_new_tokens=4))
FIRST = TurnAccount(reused={Tier.DRAM: 2}, recomputed={Cause.NEVER_STORED: 1})


def tokens(*ids: int) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(token_id=token_id) for token_id in ids)


def test_a_preempted_turn_goes_on_with_what_it_has() -> None:
    progress = _Progress(REQUEST, None, None)
    progress.begin()
    progress.receive(Started(FIRST))
    progress.receive(Delta(tokens(7), "a"))
    progress.receive(TurnEnd(finish_reason=FinishReason.PREEMPTED, tokens=tokens(8), text="b"))
    assert not progress.done
    progress.begin()
    assert progress.request.token_ids == (1, 2, 3, 7, 8)
    assert progress.request.num_prior == 2
    progress.receive(Started(TurnAccount(reused={Tier.DRAM: 4}, recomputed={Cause.LAST_TOKEN: 1})))
    progress.receive(TurnEnd(finish_reason=FinishReason.LENGTH, tokens=tokens(9, 10), text="cd"))
    assert progress.done
    answer = progress.answer
    assert (answer.token_ids, answer.text, answer.num_attempts) == ((7, 8, 9, 10), "abcd", 2)
    assert answer.account == FIRST
    assert answer.retried_tokens == 1
    assert len(answer.itl_s) == 3


def test_an_attempt_that_never_started_leaves_no_account() -> None:
    progress = _Progress(REQUEST, None, None)
    progress.begin()
    progress.begin()
    progress.receive(Started(FIRST))
    assert progress.answer.account == FIRST
    assert progress.answer.retried_tokens == 0


def test_a_failed_step_is_tried_again_a_refused_request_is_not() -> None:
    progress = _Progress(REQUEST, None, None)
    for _ in range(MAX_ATTEMPTS - 1):
        progress.begin()
        progress.receive(TurnEnd(finish_reason=FinishReason.FAILED, error="out of memory", may_retry=True))
    progress.begin()
    with pytest.raises(TurnFailed, match="out of memory"):
        progress.receive(TurnEnd(finish_reason=FinishReason.FAILED, error="out of memory", may_retry=True))
    with pytest.raises(TurnFailed, match="too long"):
        _Progress(REQUEST, None, None).receive(TurnEnd(finish_reason=FinishReason.FAILED, error="too long"))


def test_deltas_are_passed_on() -> None:
    seen: list[Delta] = []
    progress = _Progress(REQUEST, seen.append, None)
    progress.receive(Delta(tokens(7), "a"))
    progress.receive(TurnEnd(finish_reason=FinishReason.STOP, text="!"))
    assert [delta.text for delta in seen] == ["a", "!"]
