"""How a peer comes to its network: a genesis of its own making, or the one that an invite names."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from chain.calibration import Calibration, calibrated, read_calibration
from chain.codec import MAX_OBJECT_BYTES, DecodeError, decode, encode
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.randomness import onion_of
from tdml_p2p.errors import FAILED, USAGE, UserError
from tdml_p2p.home import Home, other_network, read_genesis
from tdml_p2p.host import Network
from tdml_p2p.invite import Invite
from tdml_p2p.peers import ConnectFailed, peer_info
from tdml_p2p.requests import RequestFailed
from tdml_p2p.wallet import BOND_FRACTION

log = structlog.get_logger("tdml.bootstrap")

GENESIS_PROTOCOL = "/tdml/genesis/1"
GENESIS_TIMEOUT = 20.0

FAUCET_GRANT = 1_000_000
FOUNDER_STAKE = 40 * FAUCET_GRANT // BOND_FRACTION
"""Forty joiners' bonds: even ten of them that vanish at once hold less than 1/3 of the stake."""
FOUNDER_BALANCE = 1_000 * FAUCET_GRANT
FAUCET_TOTAL = 1_000_000 * FAUCET_GRANT
_PRIVATE = Params(faucet_grant=FAUCET_GRANT)


@dataclass(frozen=True)
class Origin:
    """Where a home's network comes from: its chain id, and its genesis unless it must be fetched."""

    chain_id: bytes
    genesis: Genesis | None
    invites: tuple[Invite, ...]


def private_genesis(key: PrivateKey, timestamp_ms: int, name: str = "private", params: Params = _PRIVATE) -> Genesis:
    """Return the genesis of a new network with `key` as its sole validator and a faucet."""
    return Genesis(
        name=name.encode()[:64],
        timestamp=timestamp_ms,
        params=params,
        accounts=(Allocation(key.account, FOUNDER_BALANCE),),
        validators=(GenesisValidator(key.account, FOUNDER_STAKE, onion_of(key).tip),),
        faucet=FAUCET_TOTAL,
    )


def find_origin(
    home: Home, key: PrivateKey, join: Sequence[str], timestamp_ms: int, params: Params = _PRIVATE
) -> Origin:
    """Return the network that `home` belongs to or joins, founded now on `params` if there is none to join.

    Raises `UserError` for an invite of another network than the home's, or invites of several.
    """
    invites = tuple(_dialable(Invite.parse(line)) for line in join)
    genesis = home.load_genesis()
    if genesis is None and not invites:
        genesis = private_genesis(key, timestamp_ms, params=params)
        home.save_genesis(genesis)
        log.info("founded a private network", chain_id=genesis.chain_id.hex())
    chain_id = genesis.chain_id if genesis is not None else invites[0].chain_id
    for invite in invites:
        if invite.chain_id == chain_id:
            continue
        if genesis is not None:
            raise other_network(home.path, chain_id, invite.chain_id)
        raise UserError("The invites are of different networks.", "join one network at a time", USAGE)
    return Origin(chain_id, genesis, invites)


def _dialable(invite: Invite) -> Invite:
    try:
        peer_info(invite.address)
    except ValueError as error:
        raise UserError(f"The invite cannot be dialled: {error}.", "ask for a fresh invite line", USAGE) from None
    return invite


def initialize(path: Path, genesis_file: Path | None, calibration_file: Path | None = None) -> dict[str, str]:
    """Make a home with key and genesis, given or private, and return what it holds; raise `UserError`.

    A private network judges results by the thresholds of a calibration, if one is given.
    """
    home = Home(path)
    if genesis_file is not None and calibration_file is not None:
        hint = "vote for other thresholds with `tdml-peer vote-params --calibration FILE`"
        raise UserError("A network that exists has its thresholds already.", hint, USAGE)
    params = _PRIVATE if calibration_file is None else calibrate(_PRIVATE, calibration_file)[1]
    home.create()
    with home.lock():
        key = home.load_key()
        if genesis_file is not None:
            try:
                home.save_genesis(read_genesis(genesis_file.read_bytes(), str(genesis_file)))
            except OSError as error:
                raise UserError(f"{genesis_file} cannot be read: {error.strerror}.", "give a genesis.json") from None
        elif calibration_file is not None and home.load_genesis() is not None:
            raise UserError(f"{path} has a network with its thresholds already.", "make another home", USAGE)
        origin = find_origin(home, key, (), time.time_ns() // 1_000_000, params)
    return {"home": str(path), "peer": peer_id(key.account), "chain_id": origin.chain_id.hex()}


def calibrate(params: Params, file: Path) -> tuple[Calibration, Params]:
    """Return a calibration and `params` with the thresholds that it names; raise `UserError`."""
    hint = "make one with `python -m bench.numerics --calibration FILE`"
    try:
        found = read_calibration(file.read_bytes())
        return found, calibrated(params, found)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", hint, USAGE) from None
    except ValueError as error:
        raise UserError(f"{file} cannot be used: {error}.", hint, USAGE) from None


def serve_genesis(network: Network, genesis: Genesis) -> None:
    """Answer `/tdml/genesis/1`, so that whoever this peer invites can verify and keep the genesis."""
    data = encode(genesis)

    async def answer(_sender: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return data

    network.on_request(GENESIS_PROTOCOL, answer, 0)


async def join_network(network: Network, origin: Origin) -> Genesis:
    """Return the genesis, fetched from an inviter where it is unknown; raise `UserError`.

    A home that knows its genesis starts even when nobody it was invited by can be reached.
    """
    failures = []
    genesis = origin.genesis
    for invite in origin.invites:
        try:
            if invite.peer != network.peer:
                await network.connect(invite.address)
            if genesis is None:
                genesis = await _fetch_genesis(network, invite)
        except (RequestFailed, ConnectFailed) as error:
            log.warning("an inviter cannot be used", invite=str(invite), reason=str(error))
            failures.append(str(error))
    if genesis is None:
        raise UserError(
            f"No peer of the network could be reached ({'; '.join(failures)[:300]}).",
            "check the invite line, that the inviting peer runs, and that its port is open",
            FAILED,
        )
    return genesis


async def _fetch_genesis(network: Network, invite: Invite) -> Genesis:
    data = await network.request(invite.peer, GENESIS_PROTOCOL, b"", limit=MAX_OBJECT_BYTES, timeout=GENESIS_TIMEOUT)
    try:
        genesis: Genesis = decode(Genesis, data)
    except DecodeError as error:
        raise RequestFailed(invite.peer, f"its genesis is malformed: {error}") from None
    if genesis.chain_id != invite.chain_id:
        raise UserError(
            f"The inviting peer sent the genesis of network {genesis.chain_id.hex()[:12]}, "
            f"not of {invite.chain_id.hex()[:12]}.",
            "ask for a fresh invite line; do not use this one",
        )
    return genesis
