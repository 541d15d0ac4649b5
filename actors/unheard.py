"""Dispatched turns of which no replica has said anything yet. Knows no Ray and asks nobody."""

from __future__ import annotations

from policies import messages as m

Attempt = tuple[m.TurnId, int]


class Unheard:
    """From a Dispatch to the first word about that attempt. One that is overdue is so again `patience_s` later."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._due: dict[Attempt, tuple[float, m.Dispatch]] = {}  # when to ask; by time

    def __len__(self) -> int:
        return len(self._due)

    def expect(self, dispatch: m.Dispatch, now: float) -> None:
        self._due[_name(dispatch)] = (now + self._patience_s, dispatch)

    def note(self, event: m.Event) -> None:
        """Whatever ends the waiting: the attempt started, ended or failed, or its replica is gone."""
        match event:
            case m.TurnStarted() | m.TurnFinished():
                self._due.pop((event.turn_id, event.attempt or 0), None)
            case m.CommandFailed(command=m.Dispatch() as dispatch):
                self.forget(dispatch)
            case m.ReplicaLost() | m.ReplicaReady():
                for dispatch in [one for _, one in self._due.values() if one.replica_id == event.replica_id]:
                    self.forget(dispatch)

    def forget(self, dispatch: m.Dispatch) -> bool:
        """Whether it was still unheard of."""
        return self._due.pop(_name(dispatch), None) is not None

    def overdue(self, now: float) -> list[m.Dispatch]:
        """Those to ask for now."""
        found = []
        while self._due:
            name, (due, dispatch) = next(iter(self._due.items()))
            if due > now:
                break
            del self._due[name]
            self.expect(dispatch, now)
            found.append(dispatch)
        return found


def _name(dispatch: m.Dispatch) -> Attempt:
    return dispatch.turn_id, dispatch.attempt
