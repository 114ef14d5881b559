"""Servers that answer in place of an object store as it should not, to see what a client makes of it."""

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


@contextmanager
def server(
    answer: Callable[[str], Answer | None], host: str = "127.0.0.1"
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on this machine. answer: what a request for a path gets; None: nothing, and the connection stays open.

    Yields its URL and the headers of the requests so far, to which later ones are added.
    """
    asked: list[dict[str, str]] = []
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append({**dict(self.headers), "path": self.path})
            found = answer(self.path)
            if found is None:
                ended.wait()
                self.close_connection = True
                return
            status, headers, body = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer((host, 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://{host}:{running.server_port}", asked
    finally:
        ended.set()
        running.shutdown()
        running.server_close()


def error(status: int, code: str, message: str) -> Answer:
    """An answer as S3 gives it, with what it says besides: there, some servers repeat what they were sent."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
        f"<StringToSign>AWS4-HMAC-SHA256 x-amz-security-token:THE-TOKEN {time.time()}</StringToSign></Error>"
    )
    return status, {"Content-Type": "application/xml"}, body.encode()


def content(body: bytes) -> Answer:
    """An object."""
    return 200, {"ETag": '"x"', "Last-Modified": "Fri, 27 Nov 2026 20:38:12 GMT"}, body
