"""Steering what the store keeps of a prefix, or of a whole tenant, from Python.

    prefixes = Prefixes(running.scheduler, running.client.model)
    system = prefixes.of(token_ids_of_the_system_prompt)
    await prefixes.live(system, 24 * 3600.0)            # what begins with it expires a day after its last use
    await prefixes.delete(prefixes.of(salt="alice"))    # all of a tenant's

A prefix is known where prompts have marks: at multiples of the model's chunk_tokens, and where a turn was cut (the end
of a system prompt, of an earlier prompt or answer). Knows no sessions; nothing of it survives the scheduler's restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.shard import ModelInfo
from policies.messages import Mark
from storage import keys

MAX_SECONDS = 1e9


class Prefixes:
    """Tells a scheduler actor. Every call returns when it was heard; what is stored follows within moments."""

    def __init__(self, scheduler: Any, model: ModelInfo) -> None:
        self._scheduler, self._model = scheduler, model

    def of(self, token_ids: Sequence[int] = (), *, salt: str = "") -> Mark:
        """The prefix of these tokens under the tenant with this salt; no tokens: all that is the tenant's."""
        root = self._model.tenant_root(salt)
        chain = keys.chain(root, token_ids, self._model.chunk_tokens)
        return Mark(*chain[-1]) if chain else Mark(0, root)

    async def live(self, prefix: Mark, seconds: float | None) -> None:
        """Its time to live, see PrefixLifetimeSet; None: as everybody's. ValueError for one that is none."""
        if seconds is not None and not 0.0 < seconds <= MAX_SECONDS:
            raise ValueError(f"a time to live of {seconds} s: give seconds above 0, or None for everybody's")
        await self._scheduler.set_lifetime.remote(prefix, seconds)

    async def pin(self, prefix: Mark, seconds: float) -> None:
        """What is stored of it now stays for so long; 0 ends that. ValueError as above."""
        _check(seconds)
        await self._scheduler.pin_prefix.remote(prefix, seconds)

    async def expire(self, prefix: Mark) -> None:
        """What is stored of it is the first to go."""
        await self._scheduler.expire_prefix.remote(prefix)

    async def delete(self, prefix: Mark, refuse_s: float = 60.0) -> None:
        """Nothing of it is kept, nor taken in the next `refuse_s`. ValueError as above."""
        _check(refuse_s)
        await self._scheduler.delete_prefix.remote(prefix, refuse_s)


def _check(seconds: float) -> None:
    if not 0.0 <= seconds <= MAX_SECONDS:
        raise ValueError(f"{seconds} s: give seconds from 0 to {MAX_SECONDS:.0f}")
