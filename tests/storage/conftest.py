"""A place to keep chunks in: an S3 server on the loopback that counts what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class S3Server:
    """moto behind a counter and a switch for trouble. `requests` holds (method, path, range) of object requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        self.delay_s = 0.0
        self.most_at_once = 0
        """Requests that were being answered at the same time."""
        self._num_now = 0
        self._lock = threading.Lock()
        self.refuse: frozenset[str] = frozenset()
        """Methods that are answered with 403."""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, environ: dict, start_response: object) -> Iterable[bytes]:
        with self._lock:
            self._num_now += 1
            self.most_at_once = max(self.most_at_once, self._num_now)
        try:
            return self._answer_one(environ, start_response)
        finally:
            with self._lock:
                self._num_now -= 1

    def _answer_one(self, environ: dict, start_response: object) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.endswith(".arrow"):
            self.requests.append((method, path, environ.get("HTTP_RANGE")))
        time.sleep(self.delay_s)
        if method in self.refuse:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._moto(environ, start_response)

    def requests_of(self, method: str) -> list[str | None]:
        """Ranges of the requests with this method."""
        return [range_ for seen, _, range_ in self.requests if seen == method]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()
