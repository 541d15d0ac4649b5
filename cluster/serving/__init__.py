"""The second door: online chat. `serve run cluster.serving:app model.path=/models/mine` starts it."""

from __future__ import annotations

from typing import Any


def app(arguments: dict[str, Any]) -> Any:
    """Serve's application builder; see deployment.app."""
    from cluster.serving.deployment import app as build_app  # importing this package loads neither Ray nor FastAPI

    return build_app(arguments)
