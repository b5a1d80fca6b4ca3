"""Whether others can connect to this peer, judged by who did, and numbered steps when nobody can."""

import ipaddress
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What is known about connections from outside."""

    REACHABLE = "reachable"  # A peer has connected to us.
    UNKNOWN = "unknown"  # Nobody has tried yet.
    LOCAL = "local"  # We listen on this machine only.


@dataclass(frozen=True)
class Reachability:
    """A verdict, one plain sentence and the steps that would improve it."""

    verdict: Verdict
    detail: str
    steps: tuple[str, ...] = ()

    @property
    def is_reachable(self) -> bool | None:
        """True or False once it is known, else None."""
        return True if self.verdict is Verdict.REACHABLE else None


def judge(addresses: tuple[str, ...], inbound: int) -> Reachability:
    """Return the verdict for a peer that listens on `addresses` and saw `inbound` connections arrive."""
    hosts = [_host(address) for address in addresses]
    if hosts and all(host is not None and host.is_loopback for host in hosts):
        return Reachability(
            Verdict.LOCAL,
            "This peer listens on this machine only.",
            ("1. start with --listen /ip4/0.0.0.0/tcp/PORT to be found by other machines",),
        )
    if inbound:
        return Reachability(Verdict.REACHABLE, f"Other peers connected to this one; {inbound} of them still are.")
    return Reachability(
        Verdict.UNKNOWN,
        "No other peer has connected to this one yet.",
        (
            "1. paste the invite line into `tdml-peer start --join` on another machine",
            f"2. if it cannot connect, let TCP port {_port(addresses)} through the firewall of this machine",
            f"3. behind a home router, forward TCP port {_port(addresses)} to this machine",
        ),
    )


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(parts[2])
    except ValueError:
        return None


def _port(addresses: tuple[str, ...]) -> str:
    for address in addresses:
        parts = address.split("/")
        if "tcp" in parts:
            return parts[parts.index("tcp") + 1]
    return "PORT"
