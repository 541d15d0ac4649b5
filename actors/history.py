"""The histories' Ray shell: one actor of a cluster keeps what all front processes need to recognise conversations."""

from __future__ import annotations

from storage.histories import Histories, Record


class HistoryActor:
    """Plain class; becomes an actor in cluster/serving/keeper.py. Threads are Ray's: every call is short."""

    def __init__(self, path: str | None, max_bytes: int) -> None:
        self._histories = Histories(path, max_bytes)

    def ready(self) -> None:
        """Returns when the file is open."""

    def get(self, keys: list[str], limit: int | None = None) -> list[Record]:
        return self._histories.get(keys, limit)

    def put(self, records: list[Record], since: float) -> None:
        self._histories.put(records, since)

    def delete(self, owner: str) -> int:
        return self._histories.delete(owner)
