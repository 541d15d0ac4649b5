"""The front door: configuration, bring-up, client, batch jobs and the command line.

A job's working directory comes before installed packages on Python's path, so a folder of the user's named like one of
our rooms would hide it. That is told here, at the first import, in words.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_ROOMS = {"actors": "engine", "storage": "format.py", "policies": "messages.py"}  # room -> something only ours contains


def _refuse_hidden_rooms() -> None:
    home = Path(__file__).resolve().parent.parent
    for room, landmark in _ROOMS.items():
        spec = importlib.util.find_spec(room)
        places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
        if places and not (places[0] / landmark).exists():
            raise ImportError(
                f"the folder {places[0]} hides Reprise's package '{room}' (ours is {home / room}). "
                f"Rename your folder '{room}/', or submit the job from a directory that has none of "
                f"actors/, cluster/, policies/, storage/."
            )


_refuse_hidden_rooms()
