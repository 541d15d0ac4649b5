"""OpenAI's response bodies, made from answers. Plain dictionaries: what a client reads is what stands here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from actors.engine.params import SampledToken
from actors.wire import Delta
from cluster.client import Answer
from cluster.serving.sessions import LastTurn

DONE = b"data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def usage(answers: Sequence[Answer], last: LastTurn, session_id: str, prompts: int) -> dict[str, Any]:
    """Of all choices; a prompt counts once however many choices it has. `prompts`: how many there were."""
    per_prompt = max(1, len(answers) // max(1, prompts))
    firsts = answers[::per_prompt]
    num_prompt = sum(answer.account.num_prompt_tokens for answer in firsts)
    num_new = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(sum(answer.account.reused.values()) for answer in firsts)},
        "reprise": {
            "session_id": session_id,
            "reused": last.reused,
            "recomputed": last.recomputed,
            "drift_at": last.drift_at,
            "ttft_ms": last.ttft_ms,
            "ttft_without_reuse_ms": last.ttft_without_reuse_ms,
            "queue_ms": last.queue_ms,
            "restore_ms": last.restore_ms,
        },
    }


class Speller:
    """What a single token looks like; an incomplete character is shown as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        return text


class ChatBodies:
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, spell: Speller, logprobs: int | None) -> None:
        self._spell, self._logprobs = spell, logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, delta: Delta, offset: int) -> dict[str, Any]:  # noqa: ARG002 - completions need it
        logprobs = self._contents(delta.tokens)
        return {"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": str(answer.finish_reason)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._contents(tuple(answer.tokens)),
            "finish_reason": str(answer.finish_reason),
        }

    def _contents(self, tokens: tuple[SampledToken, ...]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": [self._content(token) for token in tokens], "refusal": None}

    def _content(self, token: SampledToken) -> dict[str, Any]:
        top = [self._one(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._one(token.token_id, token.logprob), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._spell(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


class CompletionBodies:
    """Of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, spell: Speller, logprobs: int | None) -> None:
        self._spell, self._logprobs = spell, logprobs

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002 - a text has none
        return None

    def piece(self, index: int, delta: Delta, offset: int) -> dict[str, Any]:
        logprobs = self._columns(delta.tokens, offset)
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": None}

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": str(answer.finish_reason)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = self._columns(tuple(answer.tokens), 0)
        return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": str(answer.finish_reason)}

    def _columns(self, tokens: tuple[SampledToken, ...], offset: int) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        texts = [self._spell(token.token_id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops = [{self._spell(i): finite(logprob) for i, logprob in token.top_logprobs} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def finite(logprob: float | None) -> float:
    """OpenAI's value for what has no probability at all: JSON has no infinity."""
    return max(-9999.0, logprob) if logprob is not None else -9999.0
