"""What the scheduler hears (events, past tense) and what it says (commands, imperative).

Frozen values only: ids, sizes and times. No tokens, no tensors, no object references: a chunk is an opaque key and a
number of bytes. The clock is never read here; every event is handled with a `now` in seconds given by the caller.

A prompt is described by its marks. A `Mark(end, key)` says: the tokens [0, end) hash to `key`. Marks stand at every
multiple of `chunk_tokens` and, in between, at places where a conversation was or will be cut (the end of a system
prompt, of an earlier answer, of the prompt itself):

    tokens   0 ........ C ........ 2C ....|.... 3C ..|
    marks              m1          m2     b1    m3   end
    chunks   [---------)[----------)[-----------)[---)      a chunk starts at a multiple of C

A chunk carries the marks that lie inside it, so a prompt that ends at b1 can use the first part of the third chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ChunkKey = str
TurnId = str
SessionId = str
ReplicaId = str
NodeId = str


class Tier(StrEnum):
    """A place that holds chunks, fastest first."""

    HBM = "hbm"
    DRAM = "dram"
    SSD = "ssd"
    OBJECT = "object"


class Cause(StrEnum):
    """Why a prompt token was computed and not reused (DESIGN: no miss without a cause)."""

    NEVER_STORED = "never_stored"  # this prefix was not seen before: new text
    LAST_TOKEN = "last_token"  # everything was there; its logits need one token computed
    EVICTED = "evicted"
    DECLINED = "declined"  # admission, or the plan, chose not to save or load it
    LATE = "late"  # not in place before its deadline
    COMPUTED_SOONER = "computed_sooner"  # load or compute: the engine had it before its load came
    CORRUPT = "corrupt"
    LOST = "lost"  # its node, actor, disk or bucket failed
    DELETED = "deleted"  # its conversation was deleted
    DRIFT = "template_drift"
    TRUNCATED = "truncated"
    REUSE_OFF = "reuse_off"


@dataclass(frozen=True, slots=True)
class Mark:
    """The tokens [0, end) of a prompt hash to `key`."""

    end: int
    key: ChunkKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInfo:
    """One immutable chunk: the KV of tokens [start, end). `key`: of its last mark, `parent`: of [0, start): at the
    beginning of a text its tenant's root (or None, where tenants are not told apart)."""

    key: ChunkKey
    parent: ChunkKey | None
    start: int
    end: int
    num_bytes: int
    marks: tuple[Mark, ...]  # ascending, start < mark.end <= end; the last one is (end, key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a session as the scheduler sees it."""

    turn_id: TurnId
    session_id: SessionId
    prompt: tuple[Mark, ...]  # ascending; the last mark ends at num_prompt_tokens
    num_prompt_tokens: int
    max_new_tokens: int
    priority: int = 0  # lower is more urgent
    reuse: bool = True
    drift_at: int | None = None  # first token at which the template broke the session's prefix
    affinity: str | None = None  # turns of the same one go to the same replica, where nothing speaks against it


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreStep:
    """Load tokens [start, start + num_tokens) of the turn from this chunk (its first `num_tokens` tokens)."""

    chunk: ChunkKey
    start: int
    num_tokens: int
    num_bytes: int
    tier: Tier
    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """Which chunks come from where; the engine computes from `num_reused` on. sum(recomputed) + num_reused = prompt."""

    steps: tuple[RestoreStep, ...] = ()
    recomputed: tuple[tuple[Cause, int], ...] = ()

    @property
    def num_reused(self) -> int:
        return sum(step.num_tokens for step in self.steps)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnSubmitted:
    """A turn asks to run. The same turn_id again is a new attempt: it replaces what was known of the earlier one."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnCancelled:
    turn_id: TurnId


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStarted:
    """The replica has restored what it could: the plan's leases may go."""

    turn_id: TurnId
    replica_id: ReplicaId
    attempt: int | None = None  # of the Dispatch; None: whichever is there


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """The turn left its replica (done, cancelled, failed or preempted): its slot is free."""

    turn_id: TurnId
    replica_id: ReplicaId
    attempt: int | None = None  # of the Dispatch; None: whichever is there


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksReady:
    """A replica holds new chunks in its write buffer and offers them to the store of its node."""

    replica_id: ReplicaId
    node_id: NodeId
    session_id: SessionId
    chunks: tuple[ChunkInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksSaved:
    """Saved into DRAM of the node: visible from now on."""

    node_id: NodeId
    chunks: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFetched:
    """Raised into DRAM of the node from a lower tier or another node."""

    node_id: NodeId
    chunk: ChunkKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDemoted:
    """A committed copy now exists in `tier`; the DRAM copy is still there until it is dropped."""

    node_id: NodeId
    chunk: ChunkKey
    tier: Tier
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDropped:
    """Its bytes in that tier are free again."""

    node_id: NodeId
    chunk: ChunkKey
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLost:
    """A copy that was believed to exist does not, or failed its checksum."""

    node_id: NodeId
    chunk: ChunkKey
    tier: Tier
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandFailed:
    """The command had no effect (full disk, dead actor, deadline passed): the state before it holds."""

    command: Command
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """One line of a node's inventory."""

    info: ChunkInfo
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """A node's tier: its byte budget and measured bandwidth (bytes/s) for moving up towards the engine."""

    tier: Tier
    budget_bytes: int
    bytes_per_s: float = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """A node with its tiers and what they already hold. The same node again replaces what was known of it."""

    node_id: NodeId
    tiers: tuple[TierSpec, ...]
    inventory: tuple[StoredChunk, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLost:
    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReady:
    """A replica takes turns. Again for the same id: it restarted, and whatever ran on it is gone."""

    replica_id: ReplicaId
    node_id: NodeId
    max_running_turns: int
    max_running_tokens: int  # KV capacity of its block pool
    prefill_tokens_per_s: float = 1000.0


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaClosing:
    """The replica gets no further turns; what runs there goes on. ReplicaReady opens it again."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExpected:
    """The session is about to speak (SYMPHONY's advisory): for so many seconds its chunks are treated as if `turn`
    waited behind all others. `turn` is what is known of its next prompt, and is never dispatched.

    It ends when a turn of the session is submitted. Again for the same session: in place of the earlier one; with no
    seconds, it is not expected any more.
    """

    turn: Turn
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPinned:
    """A copy of each chunk that holds these marks is kept for so many seconds. What is still on its way is not covered.

    Again for the same session: in place of the earlier pin; with no seconds, nothing is pinned any more.
    """

    session_id: SessionId
    prompt: tuple[Mark, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExpired:
    """The session is over: of the chunks with these marks, those it used last are the first to go, and those of which
    nobody knows who did (they were stored before the scheduler began)."""

    session_id: SessionId
    prompt: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDeleted:
    """No tier keeps what holds these marks, nor what goes on from it; offers of the session in the next `seconds` are
    declined, and its turns end.

    The marks are those beyond every prefix that others may share (a system prompt).
    """

    session_id: SessionId
    prompt: tuple[Mark, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixLifetimeSet:
    """Chunks that hold this prefix, or go on from it, expire when they are unused for so many seconds; None: as before.

    The longest such prefix of a chunk counts. Of what is stored already the time begins anew, unless it is up. Chunks
    that end inside the prefix may be others' beginnings: they live as those do, and not shorter than what follows them.
    """

    prefix: Mark  # here and below: Mark(0, root) is all of a tenant's
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPinned:
    """A copy of each chunk that holds this prefix, or goes on from it, is kept for so many seconds. What is still on
    its way is not covered.

    Again for the same prefix: in place of the earlier pin; with no seconds, it is not pinned any more.
    """

    prefix: Mark
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixExpired:
    """The chunks that hold this prefix, or go on from it, are the first to go, each until it is used again."""

    prefix: Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixDeleted:
    """No tier keeps what holds this prefix, nor what goes on from it; offers of such chunks in the next `seconds` are
    declined. Turns go on. Chunks that end inside the prefix go as well, but for those that others go on from."""

    prefix: Mark
    seconds: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: deadlines, leases and watermarks are looked at again."""


Event = (
    TurnSubmitted
    | TurnCancelled
    | TurnStarted
    | TurnFinished
    | ChunksReady
    | ChunksSaved
    | ChunkFetched
    | ChunkDemoted
    | ChunkDropped
    | ChunkLost
    | CommandFailed
    | NodeJoined
    | NodeLost
    | ReplicaReady
    | ReplicaLost
    | ReplicaClosing
    | SessionExpected
    | SessionPinned
    | SessionExpired
    | SessionDeleted
    | PrefixLifetimeSet
    | PrefixPinned
    | PrefixExpired
    | PrefixDeleted
    | Tick
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Run this turn now on this replica, restoring by the plan.

    No two Dispatches have the same `attempt`. A replica that names it in its answers lets the scheduler tell a late
    word about an earlier attempt of the turn from one about this attempt.
    """

    turn_id: TurnId
    replica_id: ReplicaId
    plan: RestorePlan
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """The node's store pulls these chunks out of the replica's write buffer into DRAM."""

    node_id: NodeId
    replica_id: ReplicaId
    chunks: tuple[ChunkInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline:
    """The replica forgets these offered chunks."""

    replica_id: ReplicaId
    chunks: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Raise the chunk into DRAM of `node_id` from `source` on `source_node` (`places.SHARED` for OBJECT)."""

    node_id: NodeId
    chunk: ChunkKey
    source: Tier
    source_node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Demote:
    """Write a copy of the chunk to the lower `tier`, from the fastest copy the node has (DRAM, else SSD).

    The copy it was read from stays until a Drop.
    """

    node_id: NodeId
    chunk: ChunkKey
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Remove the copy in that tier of that node."""

    node_id: NodeId
    chunk: ChunkKey
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop this attempt of the turn on its replica; its blocks are freed, its finished chunks are kept.

    The replica answers with TurnFinished for this attempt, also when it does not know it (any more).
    """

    turn_id: TurnId
    replica_id: ReplicaId
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """The replica forgets, in HBM and in its write buffer, what holds these marks and what goes on from it.

    Needs no answer.
    """

    replica_id: ReplicaId
    marks: tuple[ChunkKey, ...]


Command = Dispatch | Save | Decline | Fetch | Demote | Drop | Cancel | Forget


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How the scheduler is tuned. Durations in seconds, shares of a tier's budget between 0 and 1."""

    high_watermark: float = 0.99  # above this share of a tier's budget, eviction starts
    low_watermark: float = 0.98  # and goes on until this share
    answer_reserve: float = 1.0  # share of max_new_tokens a dispatched turn reserves beside its prompt
    restore_deadline_s: float = 10.0  # a turn at the head of the queue waits this long for its chunks
    lease_s: float = 60.0  # a dispatched turn's chunks are pinned no longer than this
    command_deadline_s: float = 30.0  # a Save, Fetch, Demote or Cancel unanswered for this long has failed
    retry_s: float = 5.0  # what failed is not tried again for this long
    offer_deadline_s: float = 5.0  # offered chunks wait this long for bytes, then they are declined
    max_pending_offers: int = 1024  # per node; more are declined at once
    write_through: bool = True  # copy new chunks to the lower tier at once; evicting them is then free
    max_fetches_in_flight: int = 8  # per node
    locality_s: float = 30.0  # whose KV is where a slot is free goes before others that came up to this much earlier
    network_bytes_per_s: float = 0.5e9  # between nodes, for estimates only
    session_ttl_s: float = 3600.0  # chunks unused for longer go first; see PrefixLifetimeSet
    ghosts: int = (
        100_000  # keys of chunks that are gone (to name the cause of a miss), and sessions: remembered at most
    )
    eviction: str = "policies.eviction:Returns"
    prefetch: str = "policies.prefetch:LookAhead"
    placement: str = "policies.placement:EarliestStart"
    admission: str = "policies.admission:Always"
    serving_order: str = "policies.serving_order:LeastUncachedFirst"
    policy_limit_s: float = 0.1  # a policy's answer that takes longer is a fault; see plugins.Guard
    strict_policies: bool = False  # the first fault of a policy ends the run (in the laboratory)

    def __post_init__(self) -> None:
        if not 0.0 < self.low_watermark <= self.high_watermark <= 1.0:
            raise ValueError(
                f"low_watermark {self.low_watermark} and high_watermark {self.high_watermark}: "
                "choose 0 < low_watermark <= high_watermark <= 1"
            )
        if not 0.0 <= self.answer_reserve <= 1.0:
            raise ValueError(f"answer_reserve is {self.answer_reserve}: choose a share between 0 and 1")
        for name in _DURATIONS:
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a number of seconds above 0")
        for name in ("max_pending_offers", "max_fetches_in_flight", "ghosts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose 1 or more")
        if not self.locality_s >= 0.0:
            raise ValueError(f"locality_s is {self.locality_s}: choose seconds, 0 for the order of the queue alone")
        if not self.network_bytes_per_s > 0.0:
            raise ValueError(f"network_bytes_per_s is {self.network_bytes_per_s}: choose a rate above 0")


_DURATIONS = (
    "restore_deadline_s",
    "lease_s",
    "command_deadline_s",
    "retry_s",
    "offer_deadline_s",
    "session_ttl_s",
    "policy_limit_s",
)
