"""Recording a cluster's event log (`cluster.record`): asking the scheduler for it, and seeing that it ends well."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray.exceptions import RayError

from actors.recorder import RecordPlan
from cluster.config import ClusterSection, ConfigError

log = logging.getLogger(__name__)

PATIENCE_S = 30.0


def record_plan(section: ClusterSection) -> RecordPlan | None:
    """A relative path counts from this process's working directory."""
    if section.record is None:
        return None
    return RecordPlan(path=os.path.abspath(section.record), max_bytes=section.record_max_bytes)


def check_recording(scheduler: Any, limit_s: float) -> None:
    """ConfigError if the scheduler was to record and cannot. Ray's errors if it does not answer in time."""
    state = ray.get(scheduler.snapshot.remote(), timeout=limit_s)["recording"]
    if state is not None and state["problem"]:
        raise ConfigError(f"cluster.record: cannot record to {state['path']}: {state['problem']}")


def end_recording(scheduler: Any) -> None:
    """Whatever was heard so far is written. Whatever goes wrong is not worth more than a warning."""
    try:
        ray.get(scheduler.stop_recording.remote(), timeout=PATIENCE_S)
    except RayError as error:
        log.warning("the end of the event log may be missing: %s", error)
