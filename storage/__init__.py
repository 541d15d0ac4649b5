"""Keeps: the identity of chunks, their bytes, and the tiers that hold them. Knows no policy, no engine and no clock."""
