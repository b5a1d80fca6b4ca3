"""Where a peer listens: what its owner says, else the same port at every start on each own address."""

import errno
import ipaddress
import socket

import structlog

from chain.hashing import digest
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.host import Network

log = structlog.get_logger("tdml.listen")

FIRST_PORT = 20_000
PORTS = 12_000
"""Below the range that systems hand out to programs that ask for any free port."""
_WILDCARDS = ("0.0.0.0", "::")
_ELSEWHERE = ("192.0.2.1", 9)
"""An address of the documentation range: routing towards it tells the own address, nothing is sent."""


def listen_addresses(wanted: tuple[str, ...], account: bytes) -> tuple[str, ...]:
    """Return the addresses to listen on; a wildcard becomes the own addresses, which others can dial.

    Raises `UserError` for an address that is no `/ip4|ip6/ADDRESS/tcp/PORT`, or that is taken.
    """
    if not wanted:
        port = _usual_port(account)
        return tuple(f"/ip4/{address}/tcp/{port}" for address in own_addresses())
    found: list[str] = []
    for text in wanted:
        family, host, port = _parse(text)
        if host in _WILDCARDS and family == "ip4":
            found.extend(f"/ip4/{address}/tcp/{port}" for address in own_addresses())
        else:
            found.append(f"/{family}/{host}/tcp/{port}")
    for address in found:
        _refuse_taken(address)
    return tuple(dict.fromkeys(found))


def own_addresses() -> tuple[str, ...]:
    """Return 127.0.0.1 and the address that this machine uses towards others, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
            outside = str(probe.getsockname()[0])
        except OSError:
            outside = "127.0.0.1"
    return tuple(dict.fromkeys(("127.0.0.1", outside)))


def inbound(network: Network) -> int:
    """Return how many of the open connections others opened to this peer."""
    connections = network.host.get_network().get_connections()
    return sum(not connection.muxed_conn.is_initiator for connection in connections)


def _usual_port(account: bytes) -> int:
    """Return this peer's own port, so that its invite outlives a restart; 0 when it is taken."""
    port = FIRST_PORT + int.from_bytes(digest("usual port", account)[:8], "big") % PORTS
    for address in own_addresses():
        try:
            _bind(address, port)
        except OSError:
            log.warning("the usual port is taken; using any free one", port=port)
            return 0
    return port


def _refuse_taken(text: str) -> None:
    """Raise `UserError` unless the address is free: libp2p would share a port with another peer of this machine."""
    _, host, port = _parse(text)
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # libp2p says what is wrong with it
        raise UserError(
            f"Cannot listen on {text}: {error.strerror}.",
            "choose another address with --listen; port 0 takes any free one",
        ) from None


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _parse(text: str) -> tuple[str, str, int]:
    parts = text.split("/")
    try:
        empty, family, host, transport, port = parts
        version = ipaddress.ip_address(host).version
        if empty or transport != "tcp" or family != f"ip{version}" or not 0 <= int(port) < 65536:
            raise ValueError(text)
    except ValueError:
        raise UserError(
            f"{text[:80]!r} is not an address to listen on.", "for example /ip4/0.0.0.0/tcp/4150", USAGE
        ) from None
    return family, host, int(port)
