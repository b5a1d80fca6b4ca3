"""How a home comes to its network: founding, joining, and the refusal of anything else."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from chain.codec import encode
from chain.genesis import Genesis
from chain.keys import PrivateKey, peer_id
from tdml_p2p.bootstrap import (
    FAUCET_GRANT,
    FOUNDER_STAKE,
    GENESIS_PROTOCOL,
    Origin,
    find_origin,
    initialize,
    join_network,
    private_genesis,
    serve_genesis,
)
from tdml_p2p.errors import FAILED, UserError
from tdml_p2p.home import Home
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.invite import Invite, invite_line
from tdml_p2p.requests import Handler
from tdml_p2p.wallet import BOND_FRACTION

FOUNDER, JOINER = PrivateKey(bytes(32)), PrivateKey(bytes([1]) * 32)
GENESIS = private_genesis(FOUNDER, 1_700_000_000_000)
OTHER = private_genesis(FOUNDER, 1_700_000_000_001)


def invite_to(genesis: Genesis) -> str:
    return invite_line(("/ip4/127.0.0.1/tcp/1",), peer_id(FOUNDER.account), genesis.chain_id)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "peer")
    home.create()
    return home


def test_a_lone_home_founds_a_network_once(home: Home) -> None:
    first = find_origin(home, FOUNDER, (), 1_700_000_000_000)
    again = find_origin(home, FOUNDER, (), 1_800_000_000_000)
    assert first == again == Origin(GENESIS.chain_id, GENESIS, ())
    assert home.load_genesis() == GENESIS


def test_joiners_that_vanish_cannot_halt_a_private_network() -> None:
    bond = FAUCET_GRANT // BOND_FRACTION
    assert bond >= GENESIS.params.min_stake
    assert 10 * bond * 3 < FOUNDER_STAKE + 10 * bond


def test_an_empty_home_takes_the_network_of_its_invite(home: Home) -> None:
    invite = Invite.parse(invite_to(GENESIS))
    assert find_origin(home, JOINER, (str(invite),), 0) == Origin(GENESIS.chain_id, None, (invite,))
    assert home.load_genesis() is None


def test_an_invite_of_another_network_is_refused(home: Home) -> None:
    home.save_genesis(GENESIS)
    with pytest.raises(UserError, match="belongs to network") as caught:
        find_origin(home, JOINER, (invite_to(OTHER),), 0)
    assert "--home" in caught.value.hint
    assert home.load_genesis() == GENESIS


def test_invites_of_two_networks_are_refused(home: Home) -> None:
    with pytest.raises(UserError, match="different networks"):
        find_origin(home, JOINER, (invite_to(GENESIS), invite_to(OTHER)), 0)


def test_an_invite_that_cannot_be_dialled_is_refused(home: Home) -> None:
    peer = peer_id(FOUNDER.account)
    with pytest.raises(UserError, match="cannot be dialled"):
        find_origin(home, JOINER, (f"/nonsense/1/p2p/{peer}@{GENESIS.chain_id.hex()}",), 0)


def test_a_genesis_of_another_network_never_replaces_the_homes(home: Home) -> None:
    home.save_genesis(GENESIS)
    home.save_genesis(GENESIS)
    with pytest.raises(UserError, match="belongs to network"):
        home.save_genesis(OTHER)
    assert home.load_genesis() == GENESIS


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"name":1}', b"null"])
def test_a_damaged_genesis_is_one_sentence(home: Home, text: bytes) -> None:
    home.genesis_path.write_bytes(text)
    with pytest.raises(UserError, match="is not a genesis file"):
        find_origin(home, JOINER, (), 0)


def test_an_edited_genesis_is_noticed(home: Home) -> None:
    home.save_genesis(GENESIS)
    home.genesis_path.write_text(home.genesis_path.read_text().replace('"1000000000"', '"1000000001"'))
    with pytest.raises(UserError, match="does not hash to its chain_id"):
        home.load_genesis()


def test_initialize_makes_a_home(tmp_path: Path) -> None:
    made = initialize(tmp_path / "peer", None)
    home = Home(tmp_path / "peer")
    genesis = home.load_genesis()
    assert genesis is not None
    assert made["chain_id"] == genesis.chain_id.hex()
    assert made["peer"] == peer_id(home.load_key().account)
    assert not home.lock_path.exists()


CALIBRATION = b'{"worst": [1e-7, 2e-7, 3e-7], "comparisons": 9}'


def test_a_new_network_judges_by_a_calibration(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_bytes(CALIBRATION)
    initialize(tmp_path / "peer", None, file)
    genesis = Home(tmp_path / "peer").load_genesis()
    assert genesis is not None
    assert genesis.params.tau == (1000, 2000, 3000)
    with pytest.raises(UserError, match="has a network with its thresholds"):
        initialize(tmp_path / "peer", None, file)
    with pytest.raises(UserError, match="network that exists"):
        initialize(tmp_path / "other", tmp_path / "genesis.json", file)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"worst": [1, 2], "comparisons": 1}', None])
def test_what_is_no_calibration_makes_no_home(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "calibration.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be"):
        initialize(tmp_path / "peer", None, file)
    assert not (tmp_path / "peer").exists()


@pytest.mark.trio
@pytest.mark.slow
async def test_a_joiner_fetches_and_verifies_the_genesis() -> None:
    async with (
        Network.open(NetworkConfig(), FOUNDER, GENESIS.chain_id) as founder,
        Network.open(NetworkConfig(), JOINER, GENESIS.chain_id) as joiner,
    ):
        invite = Invite.parse(invite_line(founder.addresses, founder.peer, GENESIS.chain_id))
        origin = Origin(GENESIS.chain_id, None, (invite,))
        serve_genesis(founder, GENESIS)
        assert await join_network(joiner, origin) == GENESIS
        for lie in (encode(OTHER), encode(GENESIS)[:-1], b""):
            founder.on_request(GENESIS_PROTOCOL, answer_with(lie), 0)
            with pytest.raises(UserError):
                await join_network(joiner, origin)
        assert await join_network(joiner, replace(origin, genesis=GENESIS)) == GENESIS


@pytest.mark.trio
@pytest.mark.slow
async def test_nobody_to_join_is_one_sentence_and_a_known_network_starts_alone() -> None:
    async with Network.open(NetworkConfig(), JOINER, GENESIS.chain_id) as joiner:
        origin = Origin(GENESIS.chain_id, None, (Invite.parse(invite_to(GENESIS)),))
        with pytest.raises(UserError, match="No peer of the network could be reached") as caught:
            await join_network(joiner, origin)
        assert caught.value.exit_code == FAILED
        assert await join_network(joiner, replace(origin, genesis=GENESIS)) == GENESIS


def answer_with(data: bytes) -> Handler:
    async def answer(_sender: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return data

    return answer
