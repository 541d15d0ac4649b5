"""OpenAI's requests as this server takes them, and what they mean for a turn.

Unknown fields are tolerated, as OpenAI and vLLM do; fields that would change the answer and are not supported are
refused in words. Fields beyond OpenAI's (top_k, min_p, ignore_eos, ...) have vLLM's names and meanings.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.engine.params import SamplingParams
from cluster.conversations import Message
from cluster.serving.errors import refuse

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_SESSION_ID = 256
MAX_INT = (1 << 63) - 1

_ROLES = {"developer": "system", "function": "tool"}

TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]  # a token id, as JSON spells a key
Count = Annotated[int, Field(ge=0, le=MAX_INT)]


class ContentPart(BaseModel):
    """A part of a message. Only text can be answered."""

    model_config = ConfigDict(extra="allow")

    type: str = "text"
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a chat; its content is a string or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def to_message(self, index: int) -> Message:
        """As the chat template takes it. ApiError for content that is no text."""
        role = _ROLES.get(self.role, self.role)
        if not self.content and role == "assistant":
            return Message(role, sound(json.dumps(self.tool_calls, ensure_ascii=False)) if self.tool_calls else "")
        if isinstance(self.content, str):
            return Message(role, sound(self.content))
        if self.content is None:
            raise refuse(f"messages[{index}] has no content: give a string", f"messages[{index}].content")
        texts = []
        for part in self.content:
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                where = f"messages[{index}].content"
                raise refuse(f"{where} has a part of type {part.type!r}: only text parts can be answered", where)
            texts.append(part.text)
        return Message(role, sound("".join(texts)))


def sound(text: str) -> str:
    """JSON can spell halves of characters, which no tokenizer takes: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_session_id(session_id: str | None, param: str) -> None:
    """ApiError for an id that cannot be one; None is fine."""
    if session_id is not None and not (0 < len(session_id) <= MAX_SESSION_ID and session_id.isprintable()):
        raise refuse(f"a session id has 1 to {MAX_SESSION_ID} printable characters", param)


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = False


class CommonRequest(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenName, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    conversation_id: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """ApiError for what is not supported."""

    @property
    def session_id(self) -> str | None:
        """What the body calls its conversation. ApiError for an id that is none."""
        check_session_id(self.conversation_id or None, "conversation_id")
        return self.conversation_id or None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def sampling(self, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """ApiError for values that no turn can have."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        stops = tuple(stop for stop in map(sound, stops) if stop)
        if len(stops) > MAX_STOPS:
            raise refuse(f"stop has {len(stops)} strings: give at most {MAX_STOPS}", "stop")
        min_tokens = self.min_tokens or 0
        if min_tokens > max_new_tokens:
            what = f"min_tokens ({min_tokens}) is above the tokens that may be generated ({max_new_tokens})"
            raise refuse(f"{what}: lower it", "min_tokens")
        try:
            return SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(0, self.top_k or 0),
                min_p=self.min_p or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=tuple((int(name), bias) for name, bias in (self.logit_bias or {}).items()),
                seed=self.seed,
                stop=stops,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_tokens,
                logprobs=logprobs,
            )
        except ValueError as error:
            raise refuse(str(error)) from None


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise refuse(f"response_format {kind!r} is not supported: ask for JSON in words", "response_format")
        if self.tools and self.tool_choice != "none":
            raise refuse("tools are not supported: leave them out or set tool_choice to 'none'", "tools")
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs needs logprobs=true", "top_logprobs")

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def to_messages(self) -> list[Message]:
        return [message.to_message(index) for index, message in enumerate(self.messages)]


class CompletionRequest(CommonRequest):
    """POST /v1/completions. A prompt is a text or token ids; several make as many times `n` choices."""

    prompt: str | list[str] | list[Count] | list[list[Count]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.echo:
            raise refuse("echo is not supported: the prompt is yours already", "echo")
        if self.suffix:
            raise refuse("suffix is not supported: leave it out", "suffix")
        if self.best_of is not None and self.best_of > self.num_choices:
            raise refuse("best_of above n is not supported: leave it out", "best_of")

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each a text, or token ids. ApiError if there is none, or too many."""
        prompt = self.prompt
        found: list[str | tuple[int, ...]]
        if isinstance(prompt, str):
            found = [sound(prompt)]
        elif prompt and all(isinstance(item, int) for item in prompt):
            found = [tuple(item for item in prompt if isinstance(item, int))]
        else:
            found = [
                sound(item) if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)
            ]
        if not found or not all(found):
            raise refuse("prompt is empty: give a text or token ids", "prompt")
        if len(found) * self.num_choices > MAX_CHOICES:
            raise refuse(f"{len(found)} prompts times n={self.num_choices}: at most {MAX_CHOICES} choices", "prompt")
        return found
