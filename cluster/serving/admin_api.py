"""Routes beyond OpenAI's, under /reprise/v1: a tenant's own sessions and memory, and for administrators the cluster."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from cluster.serving.errors import ApiError, refuse
from cluster.serving.service import Caller, Service
from cluster.serving.streaming import EventStream
from policies.messages import Mark

router = APIRouter(prefix="/reprise/v1")

LIVE_S = 1.0
"""How often a live view is sent."""

LIVE_LIMIT_S = 10.0
"""How long one request for it lasts: a shutdown waits for open ones. Whoever looks on asks again."""


ME = "me"


class PinRequest(BaseModel):
    """How long to keep a session's KV; 0 ends a pin."""

    seconds: Annotated[float, Field(ge=0, le=1e9)]


class LifetimeRequest(BaseModel):
    """How long KV may be unused before it is the first to go; null: as long as everybody's."""

    seconds: Annotated[float, Field(gt=0, le=1e9)] | None


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """What is served here. Needs no key: it says whether one is needed."""
    service = service_of(request)
    model = service.connection.model
    return {
        "model": service.model_name,
        "context_window": model.context_window,
        "max_turn_tokens": model.max_turn_tokens,
        "chunk_tokens": model.chunk_tokens,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "version": service.version,
        "auth_required": service.keyring.is_closed,
    }


@router.get("/conversations/{session_id}")
async def conversation(session_id: str, request: Request) -> dict[str, Any]:
    """One of the caller's sessions: its last turn's figures, and where its KV lies."""
    return await service_of(request).administration.describe(caller_of(request).scope, session_id)


@router.post("/conversations/{session_id}/advise", status_code=202)
async def advise(session_id: str, request: Request) -> dict[str, Any]:
    """It is about to speak: its KV is brought near."""
    await service_of(request).administration.advise(caller_of(request).scope, session_id)
    return {"expected": True}


@router.post("/conversations/{session_id}/pin")
async def pin(session_id: str, body: PinRequest, request: Request) -> dict[str, Any]:
    """Its KV stays for so long."""
    session = await service_of(request).administration.pin(caller_of(request).scope, session_id, body.seconds)
    return {"pinned_until": session.pinned_until}


@router.post("/conversations/{session_id}/expire")
async def expire(session_id: str, request: Request) -> dict[str, Any]:
    """Its KV is the first to go from now on."""
    await service_of(request).administration.expire(caller_of(request).scope, session_id)
    return {"expired": True}


@router.delete("/conversations/{session_id}")
async def delete(session_id: str, request: Request) -> dict[str, Any]:
    """Its KV leaves every tier, and its history memory and disk."""
    return await service_of(request).administration.delete(caller_of(request).scope, session_id)


@router.post("/conversations/{session_id}/lifetime")
async def set_lifetime(session_id: str, body: LifetimeRequest, request: Request) -> dict[str, Any]:
    """How long what is its alone lives unused."""
    administration = service_of(request).administration
    await administration.set_lifetime(
        await administration.own_prefix(caller_of(request).scope, session_id), body.seconds
    )
    return {"seconds": body.seconds}


# --- what conversations begin with ------------------------------------------------------------------------------------


@router.post("/conversations/{session_id}/prefix/lifetime")
async def set_prefix_lifetime(session_id: str, body: LifetimeRequest, request: Request) -> dict[str, Any]:
    """How long all that begins with its system prompt lives unused."""
    prefix = await _shared_prefix(session_id, request)
    await service_of(request).administration.set_lifetime(prefix, body.seconds)
    return {"tokens": prefix.end, "seconds": body.seconds}


@router.post("/conversations/{session_id}/prefix/pin")
async def pin_prefix(session_id: str, body: PinRequest, request: Request) -> dict[str, Any]:
    """What is stored now of all that begins with its system prompt stays for so long."""
    prefix = await _shared_prefix(session_id, request)
    await service_of(request).administration.pin_prefix(prefix, body.seconds)
    return {"tokens": prefix.end}


@router.post("/conversations/{session_id}/prefix/expire")
async def expire_prefix(session_id: str, request: Request) -> dict[str, Any]:
    """All that begins with its system prompt is the first to go."""
    prefix = await _shared_prefix(session_id, request)
    await service_of(request).administration.expire_prefix(prefix)
    return {"tokens": prefix.end}


@router.delete("/conversations/{session_id}/prefix")
async def delete_prefix(session_id: str, request: Request) -> dict[str, Any]:
    """The KV of all that begins with its system prompt leaves every tier."""
    prefix = await _shared_prefix(session_id, request)
    await service_of(request).administration.delete_prefix(prefix)
    return {"tokens": prefix.end}


async def _shared_prefix(session_id: str, request: Request) -> Mark:
    return await service_of(request).administration.shared_prefix(caller_of(request).scope, session_id)


# --- tenants ----------------------------------------------------------------------------------------------------------


@router.post("/tenants/{name}/lifetime")
async def set_tenant_lifetime(name: str, body: LifetimeRequest, request: Request) -> dict[str, Any]:
    """How long a tenant's KV lives unused."""
    await service_of(request).administration.set_lifetime(tenant_of(name, request), body.seconds)
    return {"seconds": body.seconds}


@router.post("/tenants/{name}/pin")
async def pin_tenant(name: str, body: PinRequest, request: Request) -> dict[str, Any]:
    """All that is stored now of a tenant stays for so long; for administrators, since it takes others' room."""
    administrator_of(request)
    await service_of(request).administration.pin_prefix(tenant_of(name, request), body.seconds)
    return {"seconds": body.seconds}


@router.post("/tenants/{name}/expire")
async def expire_tenant(name: str, request: Request) -> dict[str, Any]:
    """All that is stored of a tenant is the first to go."""
    await service_of(request).administration.expire_prefix(tenant_of(name, request))
    return {"expired": True}


@router.delete("/tenants/{name}/memory")
async def delete_tenant(name: str, request: Request) -> dict[str, Any]:
    """A tenant's KV leaves every tier."""
    await service_of(request).administration.delete_prefix(tenant_of(name, request))
    return {"deleted": True}


def tenant_of(name: str, request: Request) -> Mark:
    """All that is a tenant's: of the caller (`me`, or by its name), or for administrators of any. ApiError 403, 404."""
    service, caller = service_of(request), caller_of(request)
    if name in (ME, caller.tenant.name):
        return Mark(0, caller.scope)
    administrator_of(request)
    tenant = service.keyring.named(name)
    if tenant is None:
        raise ApiError(404, f"there is no tenant {name!r} with a key", code="tenant_not_found")
    return Mark(0, service.connection.model.tenant_root(tenant.salt))


@router.get("/cluster")
async def cluster(request: Request) -> dict[str, Any]:
    """Tiers, replicas and queue; for administrators."""
    administrator_of(request)
    return await service_of(request).administration.cluster()


@router.get("/live", response_model=None)
async def live(request: Request) -> EventStream:
    """The same as /cluster once a second for a while, as server-sent events."""
    administrator_of(request)
    service = service_of(request)

    async def views() -> AsyncIterator[bytes]:
        deadline = time.monotonic() + LIVE_LIMIT_S
        while time.monotonic() < deadline:
            try:
                yield b"data: " + json.dumps(await service.administration.cluster()).encode() + b"\n\n"
            except ApiError:
                yield b": the scheduler does not answer\n\n"
            await asyncio.sleep(LIVE_S)

    async def close() -> None:
        pass

    return EventStream(views(), close, {})


def caller_of(request: Request) -> Caller:
    """Who asks. ApiError 401 for an unknown key."""
    headers = request.headers
    timeout = headers.get("x-request-timeout")
    try:
        timeout_s = float(timeout) if timeout is not None else None
    except ValueError:
        raise refuse("x-request-timeout must be a number of seconds", "x-request-timeout") from None
    caller = service_of(request).caller(
        headers.get("authorization"),
        request.state.request_id,
        session_id=headers.get("x-session-id"),
        user_id=headers.get("x-user-id"),
        timeout_s=timeout_s,
    )
    request.state.facts["tenant"] = caller.tenant.name
    return caller


def administrator_of(request: Request) -> Caller:
    """Who asks, if that is an administrator. ApiError 403 for others."""
    caller = caller_of(request)
    if not caller.tenant.admin:
        raise ApiError(403, "this is for administrators: ask with an administrator's key")
    return caller


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
