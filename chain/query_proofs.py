"""The inspector's proofs: a record of the newest state, and the light blocks that lead to it from an older height."""

from typing import Any

from chain.blocks import Reason, Refused
from chain.keys import verify
from chain.light import LightBlock, LightClient, NotEnoughTrust, Trust, genesis_anchor, trusting_ms
from chain.proofs import KINDS, MAX_PATH, key_of, prove, to_document
from chain.query_errors import BadQuery, NotFound
from chain.state import State
from chain.store import Store


def light_block(store: Store, height: int) -> LightBlock:
    """Return the light block of a height; raise `NotFound` where the block is not kept."""
    found = store.block(height)
    validators = store.validators(found[0].header.validators_hash) if found else None
    if found is None or validators is None:
        raise NotFound(f"There is no block {height} here.", "the newest can always be proven from: leave --from out")
    return LightBlock(found[0].header, found[1], validators)


def proof(store: Store, state: State, arguments: dict[str, str]) -> Any:
    """Return the proof file of what `state` holds of `kind` at `id`, for who trusts the tip or height `from`.

    Height 0 is the genesis.
    """
    kind = arguments.get("kind", "")
    if kind not in KINDS:
        raise BadQuery(f"Nothing is proven of {kind[:40]!r}.", f"kinds: {', '.join(KINDS)}")
    try:
        key = key_of(kind, arguments.get("id", ""))
    except ValueError as error:
        raise BadQuery(f"{str(error)[:1].upper()}{str(error)[1:]}.", "see tdml-chain proof --help") from None
    tip = state.height
    start = arguments.get("from", str(tip))
    if not start.isdecimal() or not tip or int(start[:19]) > tip:
        raise BadQuery(f"There is no height {start[:40]} to prove from.", f"heights are from 1 to {tip}")
    try:
        path = _path(store, state, int(start))
    except Refused as error:
        raise NotFound(f"No proof leads from height {start} to {tip}: {error}.", "prove from a newer height") from None
    return to_document(prove(state, kind, key, path))


def _path(store: Store, state: State, start: int) -> tuple[LightBlock, ...]:
    """Return the light blocks that take a light client from `start` to the tip, both included."""
    tip, chain_id, period_ms = state.height, state.chain.chain_id, trusting_ms(state.params)
    now_ms = state.chain.timestamp  # the verifier's clock decides whether the first block is still to be trusted
    path: list[LightBlock] = []
    if start:
        path.append(light_block(store, start))
        client = LightClient(chain_id, None, Trust(start, path[0].header.hash), period_ms, verify)
        client.update(path[0], now_ms)
    else:
        client = LightClient(chain_id, genesis_anchor(store.genesis), None, period_ms, verify)
    while not path or path[-1].header.height < tip:
        block = light_block(store, client.wanted(tip))
        try:
            client.update(block, now_ms)
        except NotEnoughTrust:
            continue
        path.append(block)
        if len(path) > MAX_PATH + 1:
            raise Refused(Reason.NO_TRUST, "the validators have changed too often in between")
    return tuple(path)
