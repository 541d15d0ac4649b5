"""What an experiment is told when it cannot be."""

from __future__ import annotations


class LabError(ValueError):
    """A wish that cannot be granted; one line says which one and what to do."""
