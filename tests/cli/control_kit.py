"""A daemon's control socket with canned answers, and a way to run a command in this process."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

Answer = tuple[int, Any]


@dataclass
class FakeDaemon:
    """Answers by path, with a status and a JSON value; remembers requests. Bytes are sent as they are."""

    home: Path
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    def reply(self, path: str, data: Any, status: int = 200) -> None:
        """Answer `path` (with its query string) in this way from now on."""
        self.answers[path] = (status, data)


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = True
    daemon: FakeDaemon


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    # A client that has read an answer leaves at once: nothing may be left to write.
    wbufsize = -1

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        self._answer("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, method: str, body: Any) -> None:
        daemon = self.server.daemon
        daemon.requests.append((method, self.path, body))
        status, data = daemon.answers.get(self.path, (404, {"error": f"There is no {self.path}.", "hint": "look"}))
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@contextmanager
def serving(home: Path) -> Iterator[FakeDaemon]:
    """Run a fake daemon on `home`'s control socket."""
    daemon = FakeDaemon(home)
    with _Server(str(home / "control.sock"), _Handler) as server:
        server.daemon = daemon
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield daemon
        finally:
            server.shutdown()
            thread.join()
