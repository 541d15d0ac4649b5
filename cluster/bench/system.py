"""What benchmarks of the whole system share: random token ids for a model, and a store that has come to rest."""

from __future__ import annotations

import asyncio

from cluster.bringup import Running

QUIET_S = 0.1


def vocab_size(model: str) -> int:
    """Token ids below this are the tokenizer's."""
    from actors.engine.loading import load_tokenizer

    return len(load_tokenizer(model))


async def store_at_rest(cluster: Running) -> None:
    """Returns when no store has moved anything for a moment."""
    before: object = None
    while True:
        await asyncio.sleep(QUIET_S)
        now = [(store["saved_bytes"], store["demoted_bytes"]) for store in cluster.store_stats()]
        if now == before:
            return
        before = now
