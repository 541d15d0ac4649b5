"""Eviction: the contract and the orders to choose from, one small file each."""

from policies.eviction.contract import ChunkFacts, EvictionPolicy, Learner
from policies.eviction.frequency import Lfu
from policies.eviction.gdsf import Gdsf
from policies.eviction.look_ahead import LookAhead, WholeQueue
from policies.eviction.recency import Fifo, Lru
from policies.eviction.returns import Returns
from policies.eviction.s3_fifo import S3Fifo
from policies.eviction.sieve import Sieve

__all__ = [
    "ChunkFacts",
    "EvictionPolicy",
    "Fifo",
    "Gdsf",
    "Learner",
    "Lfu",
    "LookAhead",
    "Lru",
    "Returns",
    "S3Fifo",
    "Sieve",
    "WholeQueue",
]
