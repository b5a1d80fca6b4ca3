"""The local HTTP interface of a peer: everything over `control.sock`, read-only over the status port."""

import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tdml_p2p.errors import UserError
from tdml_p2p.http_transactions import MAX_BODY_BYTES, parse_transaction
from tdml_p2p.http_watch import EventFeed, WatchResponse, parse_watch

if TYPE_CHECKING:
    from trio_typing import TaskStatus

MAX_SOCKET_PATH = 107
BACKLOG = 64
LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class ApiError(Exception):
    """A refusal with an HTTP status, one plain sentence and a hint."""

    def __init__(self, code: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class ControlPeer(Protocol):
    """What the interface asks of a peer."""

    def status(self) -> dict[str, Any]:
        """Return the status of this peer, ready for JSON."""
        ...

    def page(self) -> dict[str, Any]:
        """Return what the page shows beside the status, ready for JSON."""
        ...

    def render_metrics(self) -> bytes:
        """Return the Prometheus text of every metric."""
        ...

    async def open_tasks(self) -> list[dict[str, Any]]:
        """Return the open tasks that the DHT knows and the chain confirms."""
        ...

    async def answer(self, query: str, params: Mapping[str, str]) -> Any:
        """Return the inspector's answer; raise `ApiError`."""
        ...

    async def transact(self, payload: Any) -> dict[str, Any]:
        """Submit a payload and return its id and height; raise `ApiError` with the receipt's reason."""
        ...

    async def replay(self, identity: str) -> dict[str, Any]:
        """Execute an audited cell again and return how it compares; raise `ApiError`."""
        ...

    def feed(self) -> AbstractAsyncContextManager[EventFeed]:
        """Return a subscription to the events of final blocks."""
        ...


Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The handlers of the interface, over one peer."""

    def __init__(self, peer: ControlPeer) -> None:
        self._peer = peer

    async def root(self, request: Request) -> Response:
        """Answer with the status page."""
        page = resources.files("tdml_p2p").joinpath("http_page.html").read_bytes()
        return Response(page, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """Answer that the event loop turns."""
        return _json({"ok": True})

    async def status(self, request: Request) -> Response:
        """Answer with the status of this peer."""
        return _json(self._peer.status())

    async def page_data(self, request: Request) -> Response:
        """Answer with everything that the page shows."""
        return _json(self._peer.page())

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus text."""
        return Response(self._peer.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tasks(self, request: Request) -> Response:
        """Answer with the open tasks."""
        return _json(await self._peer.open_tasks())

    async def chain(self, request: Request) -> Response:
        """Answer one query of the inspector."""
        return _json(await self._peer.answer(request.path_params["query"], dict(request.query_params)))

    async def watch(self, request: Request) -> Response:
        """Stream the events of new blocks as JSON lines."""
        try:
            wanted = parse_watch(dict(request.query_params))
        except ValueError as error:
            raise ApiError(400, f"{error}.", "from and count are numbers; topics are joined by commas") from None
        return WatchResponse(self._peer.feed, wanted)

    async def transact(self, request: Request) -> Response:
        """Sign and submit one transaction with this peer's key, and wait for its inclusion."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, "The request is too large.", f"at most {MAX_BODY_BYTES} bytes")
        try:
            payload = parse_transaction(bytes(body))
        except ValueError as error:
            raise ApiError(400, f"{error}.", 'for example {"kind":"bond","amount":"1000"}') from None
        return _json(await self._peer.transact(payload))

    async def replay(self, request: Request) -> Response:
        """Execute the cell of an audit again, here, and answer how it compares with the claim."""
        return _json(await self._peer.replay(request.path_params["audit"]))


def build_app(peer: ControlPeer, *, is_trusted: bool) -> Starlette:
    """Return the interface over `peer`; only an `is_trusted` one (the 0600 socket) may transact."""
    api = Api(peer)
    routes = [
        Route("/", api.root),
        Route("/healthz", api.health),
        Route("/status.json", api.status),
        Route("/page.json", api.page_data),
        Route("/metrics", api.metrics),
        Route("/tasks.json", api.tasks),
        Route("/chain/watch", api.watch),
        Route("/chain/{query}", api.chain),
    ]
    if is_trusted:
        routes.append(Route("/transactions", api.transact, methods=["POST"]))
        routes.append(Route("/replays/{audit}", api.replay, methods=["POST"]))
    # A page of a foreign site that resolves its own name to 127.0.0.1 must not read this one.
    guards = [] if is_trusted else [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)]
    return Starlette(
        routes=routes,
        middleware=guards,
        exception_handlers={ApiError: _refuse, 404: _not_found, 405: _not_allowed},
    )


class ControlServer:
    """Serves one peer's interface on its unix socket and, if asked, on a loopback TCP port."""

    def __init__(self, peer: ControlPeer, socket_path: Path, status_port: int | None) -> None:
        self._peer = peer
        self._path = socket_path
        self._tcp = None if status_port is None else _bind_tcp(status_port)
        try:
            self._unix = _bind_unix(socket_path)
        except BaseException:
            if self._tcp is not None:
                self._tcp.close()
            raise
        self.status_url = None if self._tcp is None else f"http://127.0.0.1:{self._tcp.getsockname()[1]}/"

    def close(self) -> None:
        """Close the sockets and remove `control.sock`."""
        self._unix.close()
        self._path.unlink(missing_ok=True)
        if self._tcp is not None:
            self._tcp.close()

    async def run(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_serve, build_app(self._peer, is_trusted=True), self._unix)
                if self._tcp is not None:
                    await nursery.start(_serve, build_app(self._peer, is_trusted=False), self._tcp)
                task_status.started()
        finally:
            self.close()


async def _serve(
    app: Starlette, sock: socket.socket, *, task_status: "TaskStatus[list[str]]" = trio.TASK_STATUS_IGNORED
) -> None:
    config = Config()
    config.errorlog = None
    config.accesslog = None
    config.graceful_timeout = 0.5
    config.include_server_header = False
    sock.listen(BACKLOG)
    await worker_serve(
        wrap_app(app, MAX_BODY_BYTES, "asgi"),
        config,
        sockets=Sockets([], [sock], []),
        task_status=task_status,
    )


def _bind_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UserError(
            f"The path {path} is too long for a socket (at most {MAX_SOCKET_PATH} bytes).",
            "choose a shorter home folder with --home DIR",
        )
    with suppress(FileNotFoundError):
        # The home's lock is held, so a socket that is there was left by a killed peer.
        if stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the inode that bind makes follows that of the socket's descriptor on Linux.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        sock.close()
        raise UserError(f"The socket {path} cannot be made: {error.strerror}.", "remove that file") from error
    sock.setblocking(False)
    return sock


def _bind_tcp(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as error:
        sock.close()
        raise UserError(
            f"The status port {port} cannot be used: {error.strerror}.",
            "choose another with --status-port N, or 0 for any free one",
        ) from error
    sock.setblocking(False)
    return sock


def _json(value: Any, code: int = 200) -> Response:
    return Response(
        msgspec.json.encode(value),
        code,
        media_type="application/json",
        headers={"cache-control": "no-store", "x-content-type-options": "nosniff"},
    )


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json({"error": error.message, "hint": error.hint}, error.code)


async def _not_found(request: Request, error: Exception) -> Response:
    return _json({"error": f"There is nothing at {request.url.path}.", "hint": "see docs/reference"}, 404)


async def _not_allowed(request: Request, error: Exception) -> Response:
    return _json({"error": f"{request.method} is not possible here.", "hint": "use GET, or POST"}, 405)
