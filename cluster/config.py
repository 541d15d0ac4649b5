"""Typed configuration: frozen sections, read from YAML and command-line overrides, checked at the door.

Each component receives only its own section. Sizes may be written as `2GiB`, `500MB` or plain bytes. Unknown names are
errors. This file starts nothing and knows no Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from policies.messages import SchedulerConfig


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which field and what to do."""


def _size(value: object) -> int:
    return int(TypeAdapter(ByteSize).validate_python(value))


Bytes = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model, and how it computes."""

    __pydantic_config__ = _STRICT

    path: str = ""
    """A folder with config.json and safetensors, or a hub id."""
    dtype: str = "auto"
    """auto (as stored), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (cuda when present), cpu, cuda."""
    chunk_tokens: Positive = 128
    """Tokens of one chunk: the unit of saving, moving and evicting."""
    block_tokens: Positive = 16
    """Tokens of one block of the KV pool."""
    kv_tokens: Positive = 32_768
    """Capacity of one replica's KV pool, in tokens."""
    max_step_tokens: Positive = 512
    """Tokens of one engine step, prefill chunks and decodes together."""
    max_running_turns: Positive = 8
    """Turns of one replica at a time."""
    write_buffer_chunks: Positive = 64
    """Chunks that may wait in a replica for the store; beyond it chunks are not saved, and computed again later."""
    keep_finished: bool = True
    """HBM as a tier: blocks of finished turns stay, and are shared, until their space is needed."""
    read_ahead_chunks: Positive = 8
    """Chunks that one restore asks a slow tier for ahead of the one it writes; bounds the memory of loading."""
    staging_buffers: Positive = 16
    """On a GPU: pinned buffers of one layer of one chunk each, through which loads go."""
    load_deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """A restore that takes longer is given up, and what it did not bring is computed."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of one replica; 0 shares the node's cores evenly among its replicas."""


@dataclass(frozen=True, kw_only=True)
class StoreSection:
    """Where KV lives when its conversation is silent. Budgets are per node."""

    __pydantic_config__ = _STRICT

    dram_bytes: Bytes = 0
    """Budget in Ray's object store; 0 takes 60 % of the node's object store."""
    ssd_url: str | None = None
    """A local folder or file:// URL for the SSD tier; `{node_ip}` is replaced. None: no such tier."""
    ssd_bytes: Bytes = 16 * 1024**3
    object_url: str | None = None
    """Any fsspec URL (s3://bucket/prefix, ...) for the object tier. None: no such tier."""
    object_bytes: Bytes = 256 * 1024**3
    salt: str = ""
    """Chunks of different salts never meet (tenants)."""


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """Where it runs."""

    __pydantic_config__ = _STRICT

    address: str | None = None
    """Ray address to join; None joins the job's cluster or starts a local one."""
    num_replicas: Positive = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    node_wait_s: Annotated[float, Field(ge=0)] = 0.0
    """How long bring-up waits for nodes that an autoscaler adds; 0: replicas that do not fit now are an error."""
    start_limit_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the replicas may take to load their model."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 1.0
    """How often node stores and replicas report; silent for ten times as long counts as lost."""
    record: str | None = None
    """A file on the scheduler's node, to which what the scheduler hears and answers is added (docs/event-log.md)."""
    record_max_bytes: Annotated[Bytes, Field(gt=0)] = 1024**3
    """Recording ends when the file has this size."""


@dataclass(frozen=True, kw_only=True)
class ServingSection:
    """Online chat: who may ask, how much, and what is remembered."""

    __pydantic_config__ = _STRICT

    model_name: str = ""
    """Under which clients ask for the model; empty takes the last part of model.path."""
    keys_file: str | None = None
    """API keys and tenants (`reprise keys new`). None: everybody may ask, and administer."""
    metrics_need_admin: bool = False
    """Whether /metrics wants an administrator's key."""
    default_max_tokens: Positive = 1024
    """Of an answer whose request does not say."""
    max_waiting_turns: Positive = 1000
    """Turns that may wait for a replica; further ones are refused with 429."""
    max_body_bytes: Annotated[Bytes, Field(gt=0)] = 8 * 1024**2
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """No answer takes longer; a request may ask for less (x-request-timeout)."""
    history_path: str | None = None
    """SQLite file in which conversations are remembered over restarts; None puts it beside a local SSD tier, if there
    is one, and else remembers in memory."""
    history_bytes: Annotated[Bytes, Field(gt=0)] = 1024**3
    num_fronts: Positive = 1
    """HTTP processes: they tokenise, and stream to the clients."""
    max_replicas: Annotated[int, Field(ge=0)] = 0
    """Above cluster.num_replicas: replicas are added and removed between the two as load wants it."""
    drain_s: Annotated[float, Field(gt=0)] = 60.0
    """On an update or shutdown: how long running turns may take to end."""
    hang_limit_s: Annotated[float, Field(gt=0)] = 120.0
    """A replica whose engine has work and makes no step for so long is started anew."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything, by section."""

    __pydantic_config__ = _STRICT

    model: ModelSection = field(default_factory=ModelSection)
    store: StoreSection = field(default_factory=StoreSection)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    serving: ServingSection = field(default_factory=ServingSection)

    def __post_init__(self) -> None:
        model = self.model
        if model.chunk_tokens % model.block_tokens:
            raise ConfigError(
                f"model.chunk_tokens ({model.chunk_tokens}) must be a multiple of "
                f"model.block_tokens ({model.block_tokens})"
            )
        if model.kv_tokens < 2 * model.chunk_tokens:
            raise ConfigError(
                f"model.kv_tokens ({model.kv_tokens}) must hold at least two chunks of {model.chunk_tokens}"
            )
        if self.cluster.record is not None and "://" in self.cluster.record:
            raise ConfigError(f"cluster.record is {self.cluster.record}: name a file of the scheduler's node, no URL")


def load_config(
    file: str | None = None, overrides: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> Config:
    """The YAML file, if any, with `section.field=value` overrides on top, and `options` (by `section.field`) on these.

    Options that are None were not given.

    Raises ConfigError for a missing or malformed file, an unknown field or a value of the wrong kind.
    """
    tree = _read_yaml(file) if file else {}
    for override in overrides:
        _apply(tree, override)
    for name, value in (options or {}).items():
        if value is not None:
            _set(tree, name, value)
    return config_from(tree, where=file or "the command line")


def config_from(tree: Mapping[str, Any], where: str = "configuration") -> Config:
    """Checks a nested mapping and makes it a Config; raises ConfigError naming each bad field."""
    unknown = set(tree.get("scheduler") or ()) - {f.name for f in dataclasses.fields(SchedulerConfig)}
    if unknown:
        raise ConfigError(
            f"{where}: scheduler.{sorted(unknown)[0]} is not a field; see `reprise config show` for all fields"
        )
    try:
        return TypeAdapter(Config).validate_python({name: value or {} for name, value in tree.items()})
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(problem) for problem in error.errors())) from None


def config_to_yaml(config: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name} is not a field; see `reprise config show` for all fields"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{name}: {message} (got {problem['input']!r})" if name else message


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(value is None or isinstance(value, dict) for value in tree.values()):
        raise ConfigError(f"{file}: expected sections (model:, store:, scheduler:, cluster:) with fields in them")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not (equals and "." in name and not name.endswith(".")):
        raise ConfigError(f"--set {override}: write section.field=value, for example store.dram_bytes=2GiB")
    _set(tree, name, yaml.safe_load(text))


def _set(tree: dict[str, Any], name: str, value: object) -> None:
    section, _, key = name.partition(".")
    if tree.get(section) is None:
        tree[section] = {}
    tree[section][key] = value
