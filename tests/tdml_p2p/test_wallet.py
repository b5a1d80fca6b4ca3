"""The wallet: what it wishes for in each situation, and that a refusal does not become a flood."""

from dataclasses import dataclass, field, replace

import pytest
import trio
import trio.testing
from msgspec import structs

from chain.keys import PrivateKey
from chain.randomness import onion_of
from chain.records import Validator
from chain.transactions import Bond, Faucet, Payload, RegisterValidator, RenewLease, Unjail
from tdml_p2p.wallet import RENEW_LAYERS, RETRY_BLOCKS, Holdings, Wallet, next_onion, wishes

TIP = bytes(range(32))
TIPS = (TIP, bytes(32))
TASK = bytes(32)
NEW = Holdings(
    height=10,
    balance=0,
    bonded=0,
    nonce=0,
    grant=1000,
    lease_blocks=20,
    is_granted=False,
    is_registered=False,
    may_unjail=False,
)
GRANTED = replace(NEW, balance=1000, nonce=1, is_granted=True)
STAKED = replace(GRANTED, balance=750, bonded=250, nonce=2)
BONDED = replace(STAKED, nonce=3, is_registered=True)
UNBONDED = replace(BONDED, balance=1000, bonded=0, nonce=5)


@pytest.mark.parametrize(
    ("own", "tip", "expected"),
    [
        (NEW, TIP, [Faucet()]),
        (NEW, None, [Faucet()]),
        (replace(NEW, grant=0), TIP, []),
        (replace(NEW, balance=5), None, []),
        (GRANTED, TIP, [Bond(250)]),
        (GRANTED, None, []),
        (replace(GRANTED, balance=250), TIP, []),
        (STAKED, TIP, [RegisterValidator(TIP)]),
        (replace(STAKED, grant=0), TIP, [RegisterValidator(TIP)]),
        (STAKED, None, []),
        (UNBONDED, TIP, []),
        (BONDED, TIP, []),
        (replace(BONDED, may_unjail=True), TIP, [Unjail()]),
        (replace(BONDED, may_unjail=True), None, []),
        (replace(BONDED, next_onion=1), TIP, [RegisterValidator(TIPS[1])]),
        (replace(BONDED, next_onion=1), None, []),
        (replace(GRANTED, grant=0), TIP, []),
        (replace(BONDED, leases=((TASK, 21),)), TIP, []),
        (replace(BONDED, leases=((TASK, 20),)), TIP, [RenewLease(TASK)]),
        (replace(BONDED, leases=((TASK, 20),)), None, [RenewLease(TASK)]),
    ],
)
def test_wishes(own: Holdings, tip: bytes | None, expected: list[Payload]) -> None:
    tips = None if tip is None else lambda number: TIPS[number]
    assert list(wishes(own, tips)) == expected


def test_the_next_onion_is_registered_once_while_the_old_one_lasts() -> None:
    key = PrivateKey(bytes(range(32)))
    onion = onion_of(key, 1)

    def asked(index: int, **changes: object) -> int | None:
        return next_onion(key, structs.replace(Validator(onion.layer(index), 0, 5, onion=1), **changes))

    assert asked(onion.length) is None
    assert asked(RENEW_LAYERS) is None
    assert asked(RENEW_LAYERS - 1) == 2
    assert asked(0) == 2
    assert asked(5, next_tip=TIP) is None
    assert asked(5, is_jailed=True) is None
    assert next_onion(key, None) is None


@dataclass
class Answer:
    """A receipt."""

    ok: bool
    reason: str = ""


@dataclass
class FakeChain:
    """An account that the ledger serves at once, or refuses for ever."""

    refuses: bool = False
    last: int = 60
    own: Holdings | None = NEW
    sent: list[tuple[int, Payload]] = field(default_factory=list)

    def holdings(self) -> Holdings | None:
        return self.own

    async def submit(self, payload: Payload) -> Answer:
        await trio.lowlevel.checkpoint()
        assert self.own is not None
        self.sent.append((self.own.height, payload))
        if self.refuses:
            return Answer(False, "not-now")
        match payload:
            case Faucet():
                self.own = replace(self.own, balance=1000, nonce=1, is_granted=True)
            case RegisterValidator():
                self.own = replace(self.own, is_registered=True)
            case Bond(amount):
                self.own = replace(self.own, bonded=amount, balance=self.own.balance - amount)
        return Answer(True)

    async def next_block(self) -> None:
        await trio.lowlevel.checkpoint()
        assert self.own is not None
        if self.own.height == self.last:
            await trio.sleep_forever()
        self.own = replace(self.own, height=self.own.height + 1)


async def run(chain: FakeChain) -> None:
    with trio.move_on_after(1.0):
        await Wallet(chain, lambda _: TIP).run()


@pytest.mark.trio
async def test_a_newcomer_becomes_a_validator_once(autojump_clock: trio.testing.MockClock) -> None:
    chain = FakeChain()
    await run(chain)
    assert [payload for _, payload in chain.sent] == [Faucet(), Bond(250), RegisterValidator(TIP)]


@pytest.mark.trio
async def test_a_refusal_is_tried_again_seldom(autojump_clock: trio.testing.MockClock) -> None:
    chain = FakeChain(refuses=True, last=10 + 2 * RETRY_BLOCKS)
    await run(chain)
    assert [height for height, _ in chain.sent] == [10, 10 + RETRY_BLOCKS, 10 + 2 * RETRY_BLOCKS]
