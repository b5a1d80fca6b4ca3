"""Invite lines: what is printed is read back, and anything else is refused in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.keys import PrivateKey, peer_id
from tdml_p2p.errors import UserError
from tdml_p2p.invite import Invite, invite_line

PEER = peer_id(PrivateKey(bytes(32)).account)
CHAIN = bytes(range(32))


def test_an_invite_is_read_back() -> None:
    line = invite_line(("/ip4/127.0.0.1/tcp/4001", f"/ip4/10.0.0.5/tcp/4001/p2p/{PEER}"), PEER, CHAIN)
    assert line == f"/ip4/10.0.0.5/tcp/4001/p2p/{PEER}@{CHAIN.hex()}"
    assert Invite.parse(f" {line}\n") == Invite(f"/ip4/10.0.0.5/tcp/4001/p2p/{PEER}", PEER, CHAIN)


def test_a_loopback_address_is_used_when_there_is_no_other() -> None:
    line = invite_line(("/ip4/127.0.0.1/tcp/4001",), PEER, CHAIN)
    assert line == f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}@{CHAIN.hex()}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        f"/ip4/1.2.3.4/tcp/1@{CHAIN.hex()}",
        f"/ip4/1.2.3.4/tcp/1/p2p/nobody@{CHAIN.hex()}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}@{CHAIN.hex()[:-2]}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}@{'z' * 64}",
        f"1.2.3.4/p2p/{PEER}@{CHAIN.hex()}",
        f"/dns4/{'a' * 600}/p2p/{PEER}@{CHAIN.hex()}",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Invite.parse(text)
    assert caught.value.hint
    assert len(caught.value.message) < 250


@given(st.text(max_size=200))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        Invite.parse(text)
    except UserError:
        return
    assert text.strip().startswith("/")
