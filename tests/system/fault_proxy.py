"""A proxy in front of an S3 server that rejects requests, as S3 does when it throttles."""

from __future__ import annotations

import http.client
import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
OF_THE_CONNECTION = frozenset({"connection", "expect", "keep-alive", "proxy-connection"})
"""Headers that are not passed on. The others are, Host included, because they are signed."""


@dataclass
class Faults:
    """Which requests are turned away, and how many were."""

    share: float
    """Of all requests."""
    always: str = ""
    """Path, `/bucket/key`, whose requests are always rejected."""
    held: str = ""
    """Part of a path: requests to write there are not answered until `let_go` is set, and then turned away."""
    holding: threading.Event = field(default_factory=threading.Event)
    """Set once such a request has come."""
    let_go: threading.Event = field(default_factory=threading.Event)
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    num_requests: int = 0
    num_drawn: int = 0
    """Requests turned away by chance."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self, path: str) -> bool:
        """Count a request, and say whether it is turned away."""
        with self._lock:
            self.num_requests += 1
            drawn = self.draw.random() < self.share
            self.num_drawn += drawn
        return drawn or path == self.always


@contextmanager
def run_fault_proxy(endpoint_url: str, faults: Faults) -> Iterator[str]:
    """Run a proxy in front of an S3 server, and yield its own endpoint."""
    target = urlsplit(endpoint_url).netloc

    class Handler(_Handler):
        def answer(self, body: bytes, *, is_chunked: bool) -> tuple[int, list[tuple[str, str]], bytes]:
            is_held = self.command == "PUT" and bool(faults.held) and faults.held in self.path
            if is_held:
                faults.holding.set()
                faults.let_go.wait()
            if is_held or faults.hit(self.path.partition("?")[0]):
                return 503, [("Content-Type", "application/xml")], SLOW_DOWN
            connection = http.client.HTTPConnection(target, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in OF_THE_CONNECTION:
                        connection.putheader(name, value)
                connection.endheaders(body or None, encode_chunked=is_chunked)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            faults.let_go.set()
            server.shutdown()
            thread.join()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    """HTTP on the client's side. Bodies are read whole, so that a connection can be used again."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, body: bytes, *, is_chunked: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return status, headers and body of the answer to the request."""
        raise NotImplementedError

    def handle_any_method(self) -> None:
        is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        body = self._chunks() if is_chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.answer(body, is_chunked=is_chunked)
        self.send_response_only(status)
        is_bodiless = self.command == "HEAD" or status in (204, 304)
        for name, value in headers:
            # The body was read whole, so it is sent with its length. That of HEAD is of a body which is not sent.
            if name.lower() not in {*OF_THE_CONNECTION, "transfer-encoding"} and (
                name.lower() != "content-length" or is_bodiless
            ):
                self.send_header(name, value)
        if not is_bodiless:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not is_bodiless:
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any_method  # noqa: N815  # http.server's names

    def _chunks(self) -> bytes:
        """Read a chunked body, trailers and all."""
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def log_message(self, *_: object) -> None:
        pass
