"""`reprise serve`: the chat server on a local Ray, or on the cluster at an address, until it is interrupted."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from ipaddress import ip_address
from typing import Any

APPLICATION = "reprise"

EXAMPLES = """examples:
  reprise model tiny --out ./models/demo --size 50m
  reprise serve --model ./models/demo
  reprise serve --model ./models/demo --port 8080 --replicas 2 --set store.ssd_url=/mnt/nvme/reprise
  reprise keys new --file keys.yaml --tenant alice && reprise serve --model ./models/demo --keys keys.yaml
  serve run cluster.serving:app model.path=./models/demo          (on a Ray cluster; or a Serve config file)

then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'
  a browser at http://127.0.0.1:8000/ shows a chat, and where its memory lies
"""


def add_to(commands: Any) -> None:
    """Adds the command to the parser of `reprise`."""
    text = "Serve chats over HTTP (OpenAI's API), with memory."
    parser = commands.add_parser(
        "serve",
        help=text,
        description=text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="model folder or hub id (or model.path in --config)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--keys", metavar="FILE", help="API keys and tenants (serving.keys_file)")
    parser.add_argument("--replicas", type=int, help="copies of the model (cluster.num_replicas)")
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16 (model.dtype)")
    parser.add_argument("--config", help="YAML file (see `reprise config show`)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cluster.config import load_config

    given = {
        "model.path": options.model,
        "model.dtype": options.dtype,
        "cluster.num_replicas": options.replicas,
        "serving.keys_file": options.keys,
    }
    serve_until_interrupted(load_config(options.config, options.set, given), options.host, options.port)


def serve_until_interrupted(config: Any, host: str, port: int) -> None:
    """Returns after SIGINT or SIGTERM, when running turns have ended. Raises what bring-up raises, in words."""
    from actors.engine.tokenizer import load_tokenizer
    from cluster import bringup
    from cluster.serving.tenants import open_keyring

    bringup.check(config)
    _check_port(host, port)
    open_keyring(config.serving.keys_file)
    if config.serving.keys_file is None and not _is_loopback(host):
        _say(
            f"warning: whoever reaches {host}:{port} may ask, see and delete everything; --keys FILE asks for API keys"
        )
    load_tokenizer(config.model.path)  # last: it takes seconds
    stop = threading.Event()
    _catch_signals(stop)
    started_ray = bringup.connect(config)
    _catch_signals(stop)  # again: Ray has taken SIGTERM for itself, to exit at once
    import ray
    from ray import serve

    try:
        _say(f"loading {config.model.path} ...")
        _start(config, host, port)
        _say(f"serving at http://{host}:{port}/ (Ctrl-C ends)")
        stop.wait()
        _say("waiting for running turns to end ...")
        serve.delete(APPLICATION)  # gently: shutdown alone would cut the streams
    finally:
        if started_ray:  # elsewhere Serve may have other applications
            ray.shutdown()


def _start(config: Any, host: str, port: int) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from cluster.bringup import BringUpError
    from cluster.serving.deployment import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    except (RayError, RuntimeError, TimeoutError) as error:
        text = str(error).strip() or type(error).__name__
        raise BringUpError(
            f"Ray Serve's proxy did not start ({text.splitlines()[-1]}): its log is in"
            " /tmp/ray/session_latest/logs/serve; a machine that is very busy may only need another try"
        ) from error
    try:
        serve.run(build(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise BringUpError(_cause(str(error))) from error


def _cause(text: str) -> str:
    """The last line of a deployment's traceback: what was raised."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if "Error: " in line and not line.startswith("ray.")]
    return raised[-1].partition("Error: ")[2] if raised else lines[-1] if lines else "the application did not start"


def _catch_signals(stop: threading.Event) -> None:
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    from cluster.bringup import BringUpError
    from cluster.config import ConfigError

    if not 0 < port < 1 << 16:
        raise ConfigError(f"--port must be between 1 and 65535, not {port}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BringUpError(
                f"cannot listen on {host}:{port} ({error.strerror or error}): see --host and --port"
            ) from None


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
