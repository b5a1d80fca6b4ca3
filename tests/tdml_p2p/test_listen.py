"""Where a peer listens: as told, or the same free port at every start."""

import socket

import pytest

from chain.keys import PrivateKey
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.listen import FIRST_PORT, PORTS, listen_addresses, own_addresses

ACCOUNT = PrivateKey(bytes(32)).account


def port_of(address: str) -> int:
    return int(address.rpartition("/")[2])


def test_an_own_address_is_never_a_wildcard() -> None:
    assert own_addresses()[0] == "127.0.0.1"
    assert "0.0.0.0" not in own_addresses()


def test_the_usual_port_is_the_same_at_every_start_and_another_for_another_peer() -> None:
    first = listen_addresses((), ACCOUNT)
    assert first == listen_addresses((), ACCOUNT)
    assert len({port_of(address) for address in first}) == 1
    assert FIRST_PORT <= port_of(first[0]) < FIRST_PORT + PORTS
    assert first != listen_addresses((), PrivateKey(bytes([1]) * 32).account)


def test_a_taken_usual_port_gives_way_to_any_free_one() -> None:
    usual = port_of(listen_addresses((), ACCOUNT)[0])
    with socket.socket() as other:
        other.bind(("127.0.0.1", usual))
        other.listen()
        assert {port_of(address) for address in listen_addresses((), ACCOUNT)} == {0}


def test_addresses_are_taken_as_told() -> None:
    told = ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/4150", "/ip4/127.0.0.1/tcp/0")
    assert listen_addresses(told, ACCOUNT) == told[:2]


def test_a_wildcard_becomes_addresses_that_others_can_dial() -> None:
    found = listen_addresses(("/ip4/0.0.0.0/tcp/4150",), ACCOUNT)
    assert found == tuple(f"/ip4/{address}/tcp/4150" for address in own_addresses())


@pytest.mark.parametrize(
    "text",
    ["", "localhost:1", "/ip4/1.2.3/tcp/1", "/ip4/1.2.3.4/udp/1", "/ip6/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/70000",
     "/ip4/1.2.3.4/tcp/x", "x/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/y"],
)  # fmt: skip
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UserError) as caught:
        listen_addresses((text,), ACCOUNT)
    assert caught.value.exit_code == USAGE
