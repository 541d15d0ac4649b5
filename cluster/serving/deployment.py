"""Reprise as a Ray Serve application: front processes that speak HTTP, before one keeper of the cluster.

    client --HTTP--> Serve's proxy -> Front (FastAPI, tokeniser) --turn--> scheduler actor
                                        ^                                     | dispatch
                                        '------------- tokens ------------ replica

Tokens go from the replica to the front process that holds the client's connection, past every other actor.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application

from actors.engine.tokenizer import load_tokenizer
from cluster.chat import ChatFormat
from cluster.config import Config, config_from
from cluster.serving.api import create_app
from cluster.serving.connection import Connection
from cluster.serving.keeper import Keeper
from cluster.serving.metrics import Metrics
from cluster.serving.service import Service
from cluster.serving.tenants import open_keyring

log = logging.getLogger(__name__)

FOLLOW_S = 2.0
MAX_ONGOING = 10_000  # of one front process; how many may wait is the scheduler's to say
HEALTH_PERIOD_S, HEALTH_LIMIT_S = 10.0, 60.0
HEAD = {"node:__internal_head__": 0.001}  # there the next one finds the conversations of the one before
START_SLACK_S = 60.0


class ServedKeeper(Keeper):
    """The keeper as Serve wants it."""

    async def __del__(self) -> None:
        """Serve calls and awaits this when the deployment is taken down."""
        await self.drain()
        await asyncio.to_thread(self.close)


@serve.ingress()
class Front:
    """One HTTP process."""

    async def __init__(self, config: Config, keeper: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        _log_to_stderr()
        self._keeper = keeper
        self._front_id = uuid.uuid4().hex[:8]
        state = await keeper.state.remote()
        self.service = Service(
            section=config.serving,
            connection=Connection(state, config.serving.max_waiting_turns),
            chat=ChatFormat(load_tokenizer(config.model.path)),
            keyring=open_keyring(config.serving.keys_file),
            metrics=Metrics(self._front_id),
        )
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, names_requests=False)  # Serve's proxy does

    async def _follow(self) -> None:
        """Hears who comes and goes, and what the other fronts have counted."""
        front_id = self._front_id
        while True:
            try:
                state, others = await self._keeper.exchange.remote(front_id, self.service.metrics.own_exposition())
                self.service.connection.adopt(state)
                self.service.others = others
            except RayError as error:
                log.warning("the keeper does not answer: %s", error)
            await asyncio.sleep(FOLLOW_S)


def build(config: Config) -> Application:
    """The application for `serve.run`."""
    drain_s = config.serving.drain_s
    keeper = serve.deployment(
        ServedKeeper,
        name="keeper",
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=2 * drain_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=config.cluster.node_wait_s + config.cluster.start_limit_s + START_SLACK_S,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
    )
    front = serve.deployment(
        Front,
        name="front",
        num_replicas=config.serving.num_fronts,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_LIMIT_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}},
    )
    application: Application = front.bind(config, keeper.bind(config))
    return application


def app(arguments: dict[str, Any]) -> Application:
    """For `serve run cluster.serving:app` and Serve's config files.

    `arguments` are sections of the configuration (`model: {path: ...}`, `store: {...}`), or fields as `section.field`.
    Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    for name, value in arguments.items():
        section, dot, key = name.partition(".")
        if dot:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = {**tree.get(section, {}), **(value or {})}
    return build(config_from(tree, where="the application's arguments"))


def _log_to_stderr() -> None:
    """One line a request, as JSON, into the process's log."""
    access = logging.getLogger("reprise.access")
    access.setLevel(logging.INFO)
    if not access.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(handler)
        access.propagate = False
