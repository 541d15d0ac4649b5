"""How threads of a torch operation wait for the next one: environment, to be set before torch is imported."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Awake for 1,000 spins, mostly enough while a turn decodes, then asleep. Beside busy neighbours, waiting awake for
longer makes a step several times as long."""
