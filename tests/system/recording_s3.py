"""A fake S3 server that records every request and can fail in ways that a real server can't be made to."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import re
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Request:
    """A client's request."""

    method: str
    host: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def access_key(self) -> str:
        """Return the key that signed it; empty: it is unsigned."""
        match = re.search(r"Credential=([^/]+)/", self.headers.get("authorization", ""))
        return match[1] if match else ""

    @property
    def region(self) -> str:
        """Return the region that it is signed for."""
        match = re.search(r"Credential=[^/]+/\d+/([^/]+)/", self.headers.get("authorization", ""))
        return match[1] if match else ""

    @property
    def client(self) -> str:
        """Return which client sent it."""
        return "s3fs" if "aiobotocore" in self.headers.get("user-agent", "").lower() else "boto3"


@dataclass
class Fake:
    """The server's state and behaviour."""

    region: str = ""
    """Requests signed for another region are redirected to this one; empty: every region is accepted."""
    no_multi_delete: str = ""
    """Error code for bulk deletes."""
    refused_client: str = ""
    """Requests of this client, `boto3` or `s3fs`, are rejected as if its keys were wrong."""
    undeletable: tuple[str, ...] = ()
    """Keys that it refuses to delete."""
    encoding: str = ""
    """Content-Encoding of all objects."""
    expires_in_s: int = 3600
    """How long assumed roles last."""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    endpoint_url: str = ""
    sts_keys: int = 0

    def sent(self, client: str = "") -> list[Request]:
        """Return the requests to S3 itself, of one client or of all."""
        return [each for each in self.requests if each.path != "/" and client in ("", each.client)]


_ASSUMED = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
<AccessKeyId>ASSUMED{number}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>
<SessionToken>token-{number}</SessionToken><Expiration>{expiration}</Expiration></Credentials><AssumedRoleUser>
<AssumedRoleId>a:b</AssumedRoleId><Arn>arn:aws:sts::1:assumed-role/r/s</Arn></AssumedRoleUser></AssumeRoleResult>
</AssumeRoleResponse>"""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: ClassVar[Fake]

    def _go(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # A proxy is asked for whole URLs.
        path, _, query = self.path.removeprefix(f"http://{self.headers['Host']}").partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.headers["Host"], path, query, headers, body)
        fake = self.fake
        fake.requests.append(request)
        if path == "/" and b"AssumeRole" in body:
            self._assume_role()
        elif request.client == fake.refused_client:
            self._error(403, "InvalidAccessKeyId")
        elif fake.region and request.region not in ("", fake.region):
            self._error(301, "PermanentRedirect", {"x-amz-bucket-region": fake.region})
        else:
            self._s3(request)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _go  # noqa: N815  # the base class's names

    def do_CONNECT(self) -> None:
        """Record where a client wants to connect through this proxy, and refuse the connection."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.fake.requests.append(Request(self.command, self.path, "", "", headers, b""))
        self._answer(502, b"")

    def _assume_role(self) -> None:
        self.fake.sts_keys += 1
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.fake.expires_in_s)
        self._answer(200, _ASSUMED.format(number=self.fake.sts_keys, expiration=f"{until:%Y-%m-%dT%H:%M:%SZ}").encode())

    def _s3(self, request: Request) -> None:
        fake, path = self.fake, urllib.parse.unquote(request.path).removeprefix("/")
        key = path if request.host.startswith("bucket.") else path.partition("/")[2]
        query = urllib.parse.parse_qs(request.query, keep_blank_values=True)
        if "list-type" in query:
            self._answer(200, _listing(fake.objects, query["prefix"][0]).encode())
        elif request.method == "POST" and "delete" in query:
            self._delete_many(request.body)
        elif request.method == "DELETE":
            if key in fake.undeletable:
                self._error(403, "AccessDenied")
            else:
                fake.objects.pop(key, None)
                self._answer(204, b"")
        elif request.method == "PUT":
            fake.objects[key] = request.body
            self._answer(200, b"", {"ETag": _etag(request.body)})
        elif key not in fake.objects:
            self._error(404, "NoSuchKey")
        else:
            self._object(request, fake.objects[key])

    def _object(self, request: Request, data: bytes) -> None:
        headers = {"ETag": _etag(data)} | ({"Content-Encoding": self.fake.encoding} if self.fake.encoding else {})
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if match:
            first = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
            last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], headers)
        else:
            self._answer(200, data, headers)

    def _delete_many(self, body: bytes) -> None:
        fake = self.fake
        if fake.no_multi_delete:
            self._error(400, fake.no_multi_delete)
            return
        errors = ""
        for key in re.findall(r"<Key>([^<]*)</Key>", body.decode()):
            if key in fake.undeletable:
                errors += f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
            else:
                fake.objects.pop(key, None)
        self._answer(200, f"<DeleteResult>{errors}</DeleteResult>".encode())

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _listing(objects: dict[str, bytes], prefix: str) -> str:
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><ETag>{escape(_etag(data))}</ETag><Size>{len(data)}</Size></Contents>"
        for key, data in sorted(objects.items())
        if key.startswith(prefix)
    )
    return f"<ListBucketResult>{entries}<IsTruncated>false</IsTruncated></ListBucketResult>"


@contextlib.contextmanager
def recording_s3(*, certificate: Path | None = None, **behaviour: object) -> Iterator[Fake]:
    """Run it; with a file that holds a certificate and its key, over TLS."""
    fake = Fake(**behaviour)  # type: ignore[arg-type]
    handler = type("Handler", (_Handler,), {"fake": fake})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        fake.endpoint_url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
