"""The HTTP application: OpenAI's endpoints, health and metrics, the page; the rest of the routes is `admin_api`'s.

A plain FastAPI application over a `Service`: Ray Serve runs it (deployment.py), tests run it without.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from actors.wire import Delta, TurnAccount
from cluster.client import Answer
from cluster.serving import admin_api
from cluster.serving.admin_api import administrator_of, caller_of, service_of
from cluster.serving.door import Door
from cluster.serving.errors import ApiError
from cluster.serving.generation import Generation
from cluster.serving.openai_bodies import DONE, ChatBodies, CompletionBodies, sse, usage
from cluster.serving.protocol import ChatRequest, CommonRequest, CompletionRequest
from cluster.serving.service import Service
from cluster.serving.sessions import last_turn
from cluster.serving.streaming import Apart, EventStream, as_header, unless_gone

log = logging.getLogger(__name__)

WEB = Path(__file__).resolve().parent.parent / "web"
ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/"})

_NO_FIELD = re.compile(r"body|query|path|str|int|float|bool|list\[.*|function-.*|constrained-.*")
"""What pydantic puts between the names of fields: places, and which of several types was tried."""

router = APIRouter()
Bodies = ChatBodies | CompletionBodies


def create_app(service: Service, *, names_requests: bool = True) -> FastAPI:
    """The application of one front process. `names_requests`: nobody before it answers with `x-request-id`."""
    app = FastAPI(title="Reprise", version=service.version, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(admin_api.router)
    app.mount("/web", _Files(directory=WEB, check_dir=False), name="web")
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(
        Door,
        metrics=service.metrics,
        max_body_bytes=service.section.max_body_bytes,
        endpoints=ENDPOINTS,
        names_requests=names_requests,
    )
    app.add_middleware(Apart)
    return app


class _Files(StaticFiles):
    """The page's parts; asked for anew each time (304), so that those of two versions are never mixed."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"
        return response


# --- OpenAI -----------------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response | EventStream:
    """Answers a chat. The conversation is recognised by its messages."""
    service, caller = service_of(request), caller_of(request)
    generation = await unless_gone(request, service.chat_completion(body, caller), Generation.close)
    return await _respond(request, body, generation, ChatBodies(service.spell, body.num_logprobs), 1)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response | EventStream:
    """Continues texts."""
    service, caller = service_of(request), caller_of(request)
    generation = await unless_gone(request, service.completion(body, caller), Generation.close)
    num_prompts = max(1, len(generation.jobs) // body.num_choices)
    return await _respond(request, body, generation, CompletionBodies(service.spell, body.logprobs), num_prompts)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served here."""
    service = service_of(request)
    caller_of(request)
    return {"object": "list", "data": [_model_card(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The model of this name."""
    service = service_of(request)
    caller_of(request)
    if name != service.model_name:
        raise ApiError(404, f"the model {name!r} is not served here", code="model_not_found", param="model")
    return _model_card(service)


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "reprise",
        "max_model_len": service.connection.model.max_turn_tokens,
    }


async def _respond(
    request: Request, body: CommonRequest, generation: Generation, bodies: Bodies, num_prompts: int
) -> Response | EventStream:
    service = service_of(request)
    head = {
        "id": f"{bodies.prefix}-{request.state.request_id.removeprefix('req-')}",
        "created": int(service.now()),
        "model": service.model_name,
    }
    headers = _headers(generation)
    request.state.facts.update(session_id=generation.jobs[0].recalled.session_id, reprise=dict(headers.items()))
    if body.stream:
        events = _stream(service, body, generation, bodies, {**head, "object": bodies.chunk_kind}, num_prompts)
        return EventStream(events, generation.close, headers)
    try:
        answers = await unless_gone(request, generation.collect())
    except Exception as error:
        raise service.in_words(error) from error
    finally:
        await generation.close()
    content = {
        **head,
        "object": bodies.kind,
        "choices": [bodies.choice(index, answer) for index, answer in enumerate(answers)],
        "usage": _usage(service, generation, answers, num_prompts),
        "system_fingerprint": service.fingerprint,
    }
    return Response(
        json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"), 200, headers, "application/json"
    )


async def _stream(
    service: Service,
    body: CommonRequest,
    generation: Generation,
    bodies: Bodies,
    head: dict[str, Any],
    num_prompts: int,
) -> AsyncIterator[bytes]:
    head["system_fingerprint"] = service.fingerprint
    usage_field: dict[str, Any] = {"usage": None} if body.wants_usage else {}
    lengths = [0] * len(generation.jobs)
    opened: set[int] = set()
    try:
        async for index, event in generation.events():
            if isinstance(event, TurnAccount):
                continue
            choices = []
            opening = bodies.opening(index)
            if opening is not None and index not in opened:
                opened.add(index)  # with the first token, not before: clients take the time of the first chunk
                choices.append(opening)
            if isinstance(event, Delta):
                choices.append(bodies.piece(index, event, lengths[index]))
                lengths[index] += len(event.text)
            else:
                choices.append(bodies.closing(index, event))
            yield b"".join(sse({**head, "choices": [choice], **usage_field}) for choice in choices)
        if body.wants_usage:
            answers = [generation.answers[index] for index in range(len(lengths))]
            yield sse({**head, "choices": [], "usage": _usage(service, generation, answers, num_prompts)})
    except Exception as failure:
        error = service.in_words(failure)
        if not isinstance(error, ApiError):
            log.exception("a stream broke")
            error = ApiError(500, "an error of this server ended the answer; its log says more")
        yield sse(error.body)
    yield DONE


def _usage(service: Service, generation: Generation, answers: list[Answer], num_prompts: int) -> dict[str, Any]:
    job = generation.jobs[0]
    last = last_turn(answers[0], job.request.drift_at, service.connection.model.prefill_tokens_per_s)
    return usage(answers, last, job.recalled.session_id, num_prompts)


def _headers(generation: Generation) -> dict[str, str]:
    """Where the first choice's prompt came from; known before its first token."""
    job, account = generation.jobs[0], generation.accounts.get(0)
    headers = {"x-reprise-session": job.recalled.session_id.encode("ascii", "backslashreplace").decode()}
    if account is not None:
        headers["x-reprise-reused"] = as_header(account.reused)
        headers["x-reprise-recomputed"] = as_header(account.recomputed)
    if job.request.drift_at is not None:
        headers["x-reprise-drift"] = f"drift at token {job.request.drift_at}"
    return headers


# --- health, metrics, page --------------------------------------------------------------------------------------------


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while turns can be answered, else 503 and why."""
    problem = await service_of(request).problem()
    if problem:
        return JSONResponse(ApiError(503, problem, code="unhealthy").body, 503)
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    """Of this server."""
    return {"version": service_of(request).version}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format, of all front processes."""
    service = service_of(request)
    if service.section.metrics_need_admin:
        administrator_of(request)
    return Response(await service.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat with its memory."""
    file = WEB / "index.html"
    if not file.is_file():
        raise ApiError(404, "this installation has no page")
    return Response(file.read_bytes(), media_type="text/html; charset=utf-8", headers={"cache-control": "no-cache"})


# --- errors -----------------------------------------------------------------------------------------------------------


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """The first of what is wrong, by its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not _NO_FIELD.fullmatch(str(part))]
    field = ".".join(path) if first["type"] != "json_invalid" else ""
    what = f"{field}: {first['msg']}" if field else f"the request is not valid: {first['msg']}"
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return JSONResponse(ApiError(400, what + more, param=field or None).body, 400)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing here: see /openapi.json", 405: "this path does not take this method"}
    body = ApiError(error.status_code, words.get(error.status_code, str(error.detail))).body
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
