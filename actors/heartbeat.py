"""How node stores and replicas stay known to the scheduler: a heartbeat, and joining again when it forgot them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError

log = logging.getLogger(__name__)


async def keep_joined(scheduler: Any, member_id: str, join: Callable[[], Awaitable[None]], period_s: float) -> None:
    """Runs for ever. A scheduler that was restarted knows nobody: its members come back to it by themselves."""
    while True:
        await asyncio.sleep(period_s)
        try:
            if not await scheduler.heartbeat.remote(member_id):
                log.warning("%s joins the scheduler again", member_id)
                await join()
        except RayError as error:
            log.warning("%s: no heartbeat: %s", member_id, str(error).splitlines()[0])
