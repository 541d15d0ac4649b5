"""Eviction: the contract and the orders to choose from, one small file each."""

from policies.eviction.contract import ChunkFacts, EvictionPolicy, Learner
from policies.eviction.look_ahead import LookAhead, WholeQueue
from policies.eviction.recency import Fifo, Lru
from policies.eviction.returns import Returns

__all__ = ["ChunkFacts", "EvictionPolicy", "Fifo", "Learner", "LookAhead", "Lru", "Returns", "WholeQueue"]
