"""Restoring a turn from S3: how many requests, and that they overlap.

The server is moto on the loopback, a development dependency, behind a counter and a delay. Its own speed says nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.bench.kv import TurnKV
from cluster.bench.timing import timed
from storage.bucket import BucketReader, ObjectTier
from storage.tier import CHUNK_SUFFIX

DELAY_S = 0.02
BUCKET = "bench"
CREDENTIALS = {"key": "bench", "secret": "bench"}


class MotoMissing(RuntimeError):  # noqa: N818 - named like what it says
    """moto is not installed."""


class S3Server:
    """moto behind a counter and a delay. `requests` counts the methods asked of chunks."""

    def __init__(self, delay_s: float) -> None:
        try:
            import moto.server as moto
            from werkzeug.serving import make_server
        except ImportError:
            raise MotoMissing('needs moto: pip install "reprise[dev]"') from None
        self.requests: Counter[str] = Counter()
        self.delay_s = delay_s
        app: Any = moto
        self._moto: Any = app.DomainDispatcherApplication(app.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, name="moto", daemon=True)
        self._thread.start()

    @property
    def options(self) -> dict[str, object]:
        """For the fsspec file system."""
        return {"endpoint_url": f"http://127.0.0.1:{self._server.server_port}", **CREDENTIALS}

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].endswith(CHUNK_SUFFIX):
            self.requests[environ["REQUEST_METHOD"]] += 1
            time.sleep(self.delay_s)
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def s3_server(delay_s: float) -> Iterator[S3Server]:
    """A server with an empty bucket. MotoMissing."""
    import logging

    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = S3Server(delay_s)
    try:
        fsspec.filesystem("s3", skip_instance_cache=True, **server.options).mkdir(BUCKET)
        yield server
    finally:
        server.close()


def measure_s3(turn: TurnKV, repeats: int) -> dict[str, Any]:
    """Requests and seconds of restoring the turn; {"note": …} where there is no server."""
    try:
        with s3_server(DELAY_S) as server:
            url, keys = f"s3://{BUCKET}/chunks", [header.key for header in turn.headers]
            tier = ObjectTier(url, 4 * turn.num_bytes, options=server.options)
            for key, chunk in zip(keys, turn.chunks):
                tier.put(key, chunk)
            reader = BucketReader(url, options=server.options)

            def restore() -> None:
                for key, chunk in zip(keys, turn.chunks):
                    reader.prefetch(key, chunk.nbytes)
                for i, key in enumerate(keys):
                    turn.load(i, reader.open(key, turn.chunks[i].nbytes))

            server.requests.clear()
            seconds = [timed(restore) for _ in range(repeats)]
            return {"requests": {method: count / repeats for method, count in server.requests.items()}, "s": seconds}
    except MotoMissing as error:
        return {"note": str(error)}
