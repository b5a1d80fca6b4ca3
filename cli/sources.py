"""Where answers come from: a running peer's control socket, or a chain database on disk."""

import http.client
import json
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from tdml_p2p.errors import FAILED, UNREACHABLE, USAGE, UserError

SOCKET = "control.sock"
_BLOCK_EVENTS = 10_000
_SECONDS = 30.0
_REPLAY_SECONDS = 1800.0


class Source(Protocol):
    """Something that answers the inspector's queries."""

    def ask(self, query: str, arguments: dict[str, str]) -> Any:
        """Return the answer as a JSON value; raise `UserError`."""

    def watch(self, arguments: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield events of blocks; raise `UserError`."""

    def replay(self, identity: str) -> Any:
        """Execute an audited cell again and return how it compares, as a JSON value; raise `UserError`."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DaemonSource:
    """A running peer, over its home's control socket."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def ask(self, query: str, arguments: dict[str, str]) -> Any:
        """Return the answer as a JSON value; raise `UserError`."""
        return self.get(f"/chain/{query}" + (f"?{urlencode(arguments)}" if arguments else ""))

    def get(self, path: str) -> Any:
        """Return the JSON value at a path of the control interface; raise `UserError`."""
        return self._exchange("GET", path, None)

    def post(self, path: str, body: dict[str, Any], seconds: float = 3 * _SECONDS) -> Any:
        """Send a JSON value and return the answer; raise `UserError`."""
        return self._exchange("POST", path, json.dumps(body).encode(), seconds)

    def replay(self, identity: str) -> Any:
        """Have the peer execute an audited cell again, and return how it compares; raise `UserError`."""
        return self.post(f"/replays/{quote(identity, safe='')}", {}, _REPLAY_SECONDS)

    def watch(self, arguments: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield events of blocks as they become final, for ever or `count` of them; raise `UserError`."""
        connection = _UnixConnection(self._home / SOCKET, None)
        count = 0
        try:
            connection.request("GET", f"/chain/watch?{urlencode(arguments)}")
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response.status, response.read())
            while line := response.readline():
                if line.strip():
                    yield _json(line)
                    count += 1
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        if str(count) != arguments.get("count"):
            raise UserError(f"The peer at {self._home} has stopped.", "start it again, then watch on", UNREACHABLE)

    def _exchange(self, method: str, path: str, body: bytes | None, seconds: float = _SECONDS) -> Any:
        connection = _UnixConnection(self._home / SOCKET, seconds)
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, data)
        return _json(data)

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"No peer answers at {self._home} ({_why(error)}).",
            "start one with `tdml-peer start`, or name its folder with --home",
            UNREACHABLE,
        )


class DatabaseSource:
    """A chain database, read without a peer."""

    def __init__(self, path: Path) -> None:
        from chain.queries import open_reader
        from chain.store import StoreCorrupt

        try:
            self._path, self._reader = path, open_reader(path)
        except FileNotFoundError:
            raise UserError(f"There is no database {path}.", "give the path of a chain.db") from None
        except StoreCorrupt as error:
            raise _damaged(error) from None

    def ask(self, query: str, arguments: dict[str, str]) -> Any:
        """Return the answer as a JSON value; raise `UserError`."""
        from chain.queries import QueryError, answer
        from chain.store import StoreCorrupt

        try:
            return answer(self._reader, query, arguments)
        except StoreCorrupt as error:
            raise _damaged(error) from None
        except QueryError as error:
            raise UserError(error.message, error.hint, FAILED if error.is_missing else USAGE) from None

    def replay(self, identity: str) -> Any:
        """Execute an audited cell again from the evidence beside the database; raise `UserError`."""
        from tdml_p2p.swarm.replay import NotReplayable, replay_database

        try:
            return replay_database(self._path, identity)
        except NotReplayable as error:
            raise UserError(error.sentence, error.hint, FAILED) from None

    def watch(self, arguments: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the events that the database holds, block by block, all or `count` of them."""
        height = int(self.ask("status", {})["height"])
        wanted = int(arguments.get("count", 0))
        count = 0
        for at in range(int(arguments.get("from", 1)), height + 1):
            for event in self.ask("events", arguments | {"from": str(at), "to": str(at), "count": str(_BLOCK_EVENTS)}):
                yield event
                count += 1
                if count == wanted:
                    return


def _why(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "nothing listens there"
        case ConnectionRefusedError():
            return "it has stopped"
        case TimeoutError():
            return "no answer in time"
        case http.client.HTTPException() | ConnectionError():
            return "it broke off"
        case _:
            return str(error)


def _damaged(error: Exception) -> UserError:
    return UserError(str(error), "restore it from a copy, or remove it and sync again")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise _unreadable() from None


def _refusal(status: int, data: bytes) -> UserError:
    """Return what a peer refused and why: what it could not make sense of is a matter of usage."""
    try:
        answer = json.loads(data)
        code = USAGE if status == HTTPStatus.BAD_REQUEST else FAILED
        return UserError(str(answer["error"]), str(answer.get("hint") or ""), code)
    except (ValueError, KeyError, TypeError):
        return _unreadable()


def _unreadable() -> UserError:
    return UserError("The peer gave an answer that cannot be read.", "see its log", FAILED)
