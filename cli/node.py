"""A remote peer as a source: what it says of one record is verified, the rest is told as its word."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cli.verification import TRUSTING_HOURS, trust_of
from tdml_p2p.errors import FAILED, USAGE, UserError

if TYPE_CHECKING:
    from chain.light import Anchor, Trust
    from chain.proofs import Proof, Proven
    from tdml_p2p.remote import Node

_RECORDS = ("account", "validator", "task", "claim", "audit", "params")
_UNVERIFIED = "This is the word of one peer; account, validator, task, claim, audit, params and proof are verified."


class NodeSource:
    """The peer at a multiaddr or invite, believed from `trust` (HEIGHT:HASH) or from the invite's chain id on."""

    def __init__(self, place: str, trust: str) -> None:
        self._address, _, self._chain = place.rpartition("@") if "@" in place else (place, "", "")
        self._trust = trust_of(trust) if trust else None

    def ask(self, query: str, arguments: dict[str, str]) -> Any:
        """Return the answer as a JSON value; raise `UserError`."""
        import trio

        from tdml_p2p.logs import configure_logs

        configure_logs("error")
        return trio.run(self._ask, query, arguments)

    def watch(self, arguments: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Refuse: events are not proven."""
        raise UserError("A remote peer's events cannot be followed.", "join its network, then watch your own", USAGE)

    def replay(self, identity: str) -> Any:
        """Refuse: the material of an audit is fetched by a peer of the network."""
        raise UserError("A remote peer is not asked to replay an audit.", "join its network and ask your peer", USAGE)

    async def _ask(self, query: str, arguments: dict[str, str]) -> Any:
        from tdml_p2p.remote import OPEN_QUERIES, reach

        if "height" in arguments or query not in (*OPEN_QUERIES, *_RECORDS):
            names = ", ".join(dict.fromkeys((*OPEN_QUERIES, *_RECORDS)))
            raise UserError("A remote peer is not asked this.", f"of the newest state it answers: {names}", USAGE)
        async with reach(self._address) as node:
            if query in _RECORDS:
                return await self._record(node, query, arguments.get("id", ""))
            if query == "proof":
                return (await self._prove(node, arguments["kind"], arguments["id"]))[0]
            answer = await node.ask(query, arguments)
        return answer | {"warnings": [_UNVERIFIED]} if isinstance(answer, dict) else answer

    async def _record(self, node: "Node", kind: str, key: str) -> dict[str, Any]:
        from chain.views import plain

        _, proven = await self._prove(node, kind, key)
        if proven.record is None:
            raise UserError(f"There is no {kind} {key}: proven at height {proven.height}.", "check its name", FAILED)
        name = {kind: proven.key} if key else {}
        return {**name, **plain(proven.record), "verified": True, "height": proven.height}

    async def _prove(self, node: "Node", kind: str, key: str) -> tuple[dict[str, Any], "Proven"]:
        """Return the file and the meaning of the peer's proof, verified; raise `UserError`."""
        from chain.blocks import Refused
        from chain.codec import DecodeError
        from chain.proofs import check, key_of, to_document

        try:
            wanted = key_of(kind, key)
        except ValueError as error:
            raise UserError(f"{error}.", "see tdml-chain proof --help", USAGE) from None
        start, height, period_ms = await self._start(node)
        document = await node.ask("proof", {"kind": kind, "id": key, "from": str(height)})
        try:
            proof: Proof = _decoded(document)
            if (document["kind"], proof.key) != (kind, wanted):
                raise DecodeError("it is of something else")
            proven = check(proof, start, time.time_ns() // 1_000_000, period_ms)
        except (DecodeError, Refused) as error:
            hint = "believe nothing of what it says; a trust that expired needs a newer --trust HEIGHT:HASH"
            raise UserError(f"The peer's proof does not hold: {error}.", hint, FAILED) from None
        return to_document(proof), proven

    async def _start(self, node: "Node") -> tuple["Trust | Anchor", int, int]:
        """Return what is believed, its height and the trusting period in milliseconds."""
        from chain.light import genesis_anchor, trusting_ms

        if self._trust is not None:
            return self._trust, self._trust.height, int(TRUSTING_HOURS * 3_600_000)
        try:
            chain_id = bytes.fromhex(self._chain)
        except ValueError:
            chain_id = b""
        if len(chain_id) != 32:
            raise UserError(
                "A remote peer's word is not enough.", "add --trust HEIGHT:HASH, or give its whole invite line", USAGE
            )
        genesis = await node.genesis(chain_id)
        return genesis_anchor(genesis), 0, trusting_ms(genesis.params)


def _decoded(document: Any) -> "Proof":
    import json

    from chain.proofs import from_text

    return from_text(json.dumps(document))
