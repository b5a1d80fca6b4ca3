"""What a peer does for its own account by itself: grant, bond, leases, unjailing, the next onion."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import trio

from chain.keys import PrivateKey
from chain.randomness import onion_of
from chain.records import Validator
from chain.transactions import Bond, Faucet, Payload, RegisterValidator, RenewLease, Unjail

if TYPE_CHECKING:
    from trio_typing import TaskStatus

log = structlog.get_logger("tdml.wallet")

RETRY_BLOCKS = 20
"""Heights before a transaction that failed is tried again."""
RENEW_LAYERS = 8192
"""Reveals left in an onion when the next one is registered; blocks keep coming while it waits for its epoch."""
BOND_FRACTION = 4
"""A joiner bonds a quarter of its grant."""


@dataclass(frozen=True)
class Holdings:
    """What the chain says of one account, as far as the wallet acts on it.

    `grant` is the faucet's amount, 0 without a faucet; `leases` are (task, height at which it ends).
    """

    height: int
    balance: int
    bonded: int
    nonce: int
    grant: int
    lease_blocks: int
    is_granted: bool
    is_registered: bool
    may_unjail: bool
    next_onion: int | None = None
    """The number of the onion to register because the one in use is nearly used up."""
    leases: tuple[tuple[bytes, int], ...] = ()


def next_onion(key: PrivateKey, validator: Validator | None) -> int | None:
    """Return the number of the onion that a validator should register now, while the old one lasts an epoch or more."""
    if validator is None or not validator.is_able or validator.next_tip is not None:
        return None
    try:
        is_low = onion_of(key, validator.onion).left(validator.onion_tip) < RENEW_LAYERS
    except LookupError:  # used up
        is_low = True
    return validator.onion + 1 if is_low else None


def wishes(own: Holdings, tip_of: Callable[[int], bytes] | None) -> Iterator[Payload]:
    """Yield what the account needs now, most urgent first.

    `tip_of` gives the tips of its onions by their number, None where it does not want to validate.
    """
    for task, until in own.leases:
        if until - own.height <= own.lease_blocks // 2:
            yield RenewLease(task)
    if own.grant and not own.is_granted and own.balance == own.bonded == own.nonce == 0:
        yield Faucet()
    if tip_of is None:
        return
    if own.may_unjail:
        yield Unjail()
    if own.next_onion is not None:
        yield RegisterValidator(tip_of(own.next_onion))
    if own.is_registered:
        # Who unbonds after registering wants to; only a newcomer is bonded without being asked.
        return
    stake = own.grant // BOND_FRACTION
    if own.bonded:
        yield RegisterValidator(tip_of(0))
    elif stake and own.balance > stake:
        yield Bond(stake)


class WalletChain(Protocol):
    """What the wallet needs of the peer."""

    def holdings(self) -> Holdings | None:
        """Return what this peer holds, None while the chain is behind."""
        ...

    async def submit(self, payload: Payload) -> Any:
        """Sign, gossip and wait for the receipt; it has `ok` and `reason`."""
        ...

    async def next_block(self) -> None:
        """Wait until another block is final."""
        ...


class Wallet:
    """Sees after every block that this peer's account has what it needs; one transaction at a time."""

    def __init__(self, chain: WalletChain, tip_of: Callable[[int], bytes] | None) -> None:
        self._chain = chain
        self._tip_of = tip_of
        self._tried: dict[Payload, int] = {}

    async def run(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Act until cancelled."""
        task_status.started()
        while True:
            own = self._chain.holdings()
            if own is None or not await self._act(own):
                await self._chain.next_block()

    async def _act(self, own: Holdings) -> bool:
        for payload in wishes(own, self._tip_of):
            if own.height < self._tried.get(payload, 0):
                continue
            self._tried = {tried: until for tried, until in self._tried.items() if until > own.height}
            self._tried[payload] = own.height + RETRY_BLOCKS
            receipt = await self._chain.submit(payload)
            name = type(payload).__name__
            if receipt.ok:
                log.info("wallet transaction included", kind=name)
            else:
                log.warning("wallet transaction refused", kind=name, reason=str(receipt.reason))
            return True
        return False
