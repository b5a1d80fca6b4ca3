"""Key rotation of one home: the successor's consent, and the files changed over once it is final.

The new key is durable before anything is sent, and the old one is kept. A signing record belongs to one
key: the new key, which has never signed, begins an empty one above the newest block. Whatever moment the
machine stops at, running the same command again goes on.
"""

import os

from chain.genesis import Genesis
from chain.keys import PrivateKey, peer_id
from chain.randomness import onion_of
from chain.signing import RecordMissing, SigningRecord
from chain.store import Store
from chain.transactions import RotateKey, rotation_bytes
from tdml_p2p.errors import UserError
from tdml_p2p.home import Home

_NAMED = 8
"""Letters of a peer id in the names of files that are kept."""


def rotation(genesis: Genesis, old: bytes, new: PrivateKey) -> RotateKey:
    """Return the payload by which `new` succeeds the account `old`."""
    return RotateKey(new.account, onion_of(new).tip, new.sign(rotation_bytes(genesis.chain_id, old)))


def network_of(home: Home) -> Genesis:
    """Return the genesis of the home's network; raise `UserError` where it has none."""
    genesis = home.load_genesis()
    if genesis is None:
        raise UserError(f"The home {home.path} belongs to no network yet.", "join one first: tdml-peer start")
    return genesis


def adopt(home: Home) -> tuple[PrivateKey, PrivateKey]:
    """Change the files over to the next key; return the old and the new one.

    Raises `UserError` while a peer runs here, without a next key, and until the chain knows it as heir.
    """
    with home.lock():
        old, new, genesis = home.load_key(), home.load_next_key(), network_of(home)
        if new is None:
            raise UserError("This home has no next key.", "begin with: tdml-peer key rotate")
        height = _height_of_rotation(home, genesis, old, new)
        kept = peer_id(old.account)[-_NAMED:]
        _renew_record(home, genesis, new, height, f"signing-{kept}.db")
        home.swap_keys(f"key-{kept}")
    return old, new


def _height_of_rotation(home: Home, genesis: Genesis, old: PrivateKey, new: PrivateKey) -> int:
    """Return the newest height at which the chain here knows `new` as the heir of `old`."""
    store = Store.open(home.chain_path, genesis)
    try:
        state = store.load_state()
    finally:
        store.close()
    if state.heir(old.account) != new.account:
        raise UserError(
            f"The chain does not know {peer_id(new.account)} as the successor of this key.",
            "run tdml-peer key rotate while the peer runs, and wait until it is included",
        )
    return state.height


def _renew_record(home: Home, genesis: Genesis, new: PrivateKey, height: int, kept: str) -> None:
    """Put a record of the new key in the place of the old one's, which is kept under another name."""
    fresh = home.path / "signing.next.db"
    for left in home.path.glob(f"{fresh.name}*"):
        left.unlink()
    try:
        owned = SigningRecord.open(
            home.signing_path, chain_id=genesis.chain_id, account=new.account, sign=new.sign, tip=max(height, 1)
        )
    except RecordMissing:
        pass
    else:
        owned.close()
        return
    SigningRecord.create(fresh, chain_id=genesis.chain_id, account=new.account, sign=new.sign, floor=height).close()
    if home.signing_path.exists():
        SigningRecord.open_existing(home.signing_path, new.sign).close()  # its log is folded into the file
        os.replace(home.signing_path, home.path / kept)
    os.replace(fresh, home.signing_path)
