"""Where a peer listens: what its owner says, else the same port at every start on each own address."""

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

    Raises `UserError` for an address that is no `/ip4|ip6/ADDRESS/tcp/PORT`.
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
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                log.warning("the usual port is taken; using any free one", port=port)
                return 0
    return port


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
