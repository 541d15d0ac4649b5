"""The policy laboratory: the real scheduler and the real policies under a virtual clock, on traces."""
