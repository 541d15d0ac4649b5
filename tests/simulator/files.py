"""Small files to read, and the messages that reading them raises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from policies.simulator.readers import read_trace
from policies.simulator.trace import TraceError


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def fault(path: Path, **options: Any) -> str:
    """The message of the TraceError that reading raises, without the folder; always one line."""
    with pytest.raises(TraceError) as raised:
        read_trace(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def line(timestamp: float, length: int, ids: list[int], output: int = 5) -> dict[str, Any]:
    """Of Mooncake's traces."""
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids}
