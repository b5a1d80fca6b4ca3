"""The Hypothesis state machine over a ledger with everybody on it; its tests say how long it runs."""

import random
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec import structs

from chain.hashing import digest
from chain.keys import PrivateKey
from chain.transactions import (
    Bond,
    CloseTask,
    Faucet,
    LeaveSeat,
    Payload,
    RegisterValidator,
    RenewLease,
    RotateKey,
    TopUp,
    Transfer,
    Unbond,
    Unjail,
    VoteParams,
    WatchWorker,
    Withdraw,
    rotation_bytes,
)
from tests.chain.ledger_kit import BALANCE, KEYS, ONIONS, STAKE
from tests.chain.ledger_players import FRAUD, SMALL, Players, quick_genesis
from tests.chain.record_strategies import valid

EVERYBODY = st.sampled_from(KEYS[:12])
VALIDATORS = st.sampled_from(KEYS[:5])
AMOUNTS = st.sampled_from([0, 1, 7, 400, 1000, STAKE // 2, STAKE, BALANCE, BALANCE + 1, 2**62])
INDEX = st.integers(0, 7)
SEEDS = st.integers(0, 2**16)
SHAPES = st.fixed_dictionaries(
    {
        "price": st.sampled_from([1, 10]),
        "stages": st.integers(1, 3),
        "replicas": st.integers(1, 3),
        "redundancy": st.sampled_from([1, 1, 3]),
        "microbatches": st.integers(1, 3),
        "steps": st.integers(1, 5),
        "depth": st.integers(1, 4),
        "lifetime": st.sampled_from([8, 40]),
        "worker_bond": st.sampled_from([0, 200, 5000]),
    }
)


class Machine(RuleBasedStateMachine):
    """Rules put payloads into the next blocks; every block is checked by the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.players = Players(quick_genesis())

    @initialize(fee=st.sampled_from([0, 0, 1]), workers=st.integers(3, 7), rate=st.sampled_from([10_000, 5000]))
    def begin(self, fee: int, workers: int, rate: int) -> None:
        """Start with one task that has workers."""
        self.players = Players(quick_genesis(fee))
        self.players.post(KEYS[5], audit_rate=rate)
        self.players.block()
        self.players.apply_all(KEYS[:workers])
        for _ in range(3):
            self.players.block()

    def task(self, index: int) -> bytes:
        """Return one of the tasks."""
        tasks = self.players.tasks()
        return tasks[index % len(tasks)] if tasks else bytes(32)

    @rule(client=EVERYBODY, shape=SHAPES, spare=st.sampled_from([0, 0, 5]))
    def post(self, client: PrivateKey, shape: dict[str, int], spare: int) -> None:
        """Post a task."""
        self.players.post(client, spare, **shape)

    @rule(
        key=EVERYBODY, index=INDEX, kind=st.sampled_from([RenewLease, RenewLease, LeaveSeat, CloseTask, TopUp]),
        amount=AMOUNTS,
    )  # fmt: skip
    def touch(self, key: PrivateKey, index: int, kind: Any, amount: int) -> None:
        """Do something to a task."""
        task = self.task(index)
        self.players.send(key, TopUp(task, amount) if kind is TopUp else kind(task))

    @rule(index=INDEX, client=EVERYBODY, worker=EVERYBODY)
    def watch(self, index: int, client: PrivateKey, worker: PrivateKey) -> None:
        """Let somebody, now and then the client, have a worker audited in full."""
        task = self.players.state.task(self.task(index))
        keys = {key.account: key for key in KEYS}
        sender = keys.get(task.client, client) if task is not None and client in KEYS[:5] else client
        self.players.send(sender, WatchWorker(self.task(index), worker.account))

    @rule(index=INDEX, leaver=EVERYBODY)
    def close_or_leave(self, index: int, leaver: PrivateKey) -> None:
        """Let the client close its task while a worker leaves."""
        task = self.task(index)
        if task in self.players.swarms:
            self.players.send(leaver, LeaveSeat(task))
            self.players.send(self.players.swarms[task].client, CloseTask(task))

    @rule(key=EVERYBODY, to=EVERYBODY, amount=AMOUNTS, kind=st.sampled_from(["pay", "bond", "unbond", "all"]))
    def move(self, key: PrivateKey, to: PrivateKey, amount: int, kind: str) -> None:
        """Move money or stake."""
        payloads: dict[str, Payload] = {
            "pay": Transfer(to.account, amount),
            "bond": Bond(amount),
            "unbond": Unbond(amount),
            "all": Unbond(max(1, self.players.state.account(key.account).bonded)),
        }
        self.players.send(key, payloads[kind])

    @rule(key=EVERYBODY, kind=st.sampled_from([Withdraw, Faucet, Unjail, RegisterValidator]))
    def stand(self, key: PrivateKey, kind: Any) -> None:
        """Change what one is."""
        self.players.send(key, kind(ONIONS[key.account].tip) if kind is RegisterValidator else kind())

    @rule(key=VALIDATORS, amount=st.sampled_from([1, 400, STAKE // 2]), blocks=st.integers(0, 7))
    def hurry(self, key: PrivateKey, amount: int, blocks: int) -> None:
        """Unbond, and withdraw after a while."""
        self.players.send(key, Unbond(amount))
        for _ in range(blocks):
            self.players.block()
        self.players.send(key, Withdraw())

    @rule(key=EVERYBODY, successor=EVERYBODY)
    def rotate(self, key: PrivateKey, successor: PrivateKey) -> None:
        """Go on under another key."""
        chain_id = self.players.genesis.chain_id
        proof = successor.sign(rotation_bytes(chain_id, key.account))
        self.players.send(key, RotateKey(successor.account, ONIONS[successor.account].tip, proof))

    @rule(keys=st.sets(VALIDATORS, min_size=3), changes=st.sampled_from([{"draw_delay": 3}, {"claim_window": 9}]))
    def vote(self, keys: set[PrivateKey], changes: dict[str, int]) -> None:
        """Stand for other parameters."""
        wish = structs.replace(self.players.state.params, **changes)
        for key in sorted(keys, key=lambda one: one.account):
            self.players.send(key, VoteParams(wish))

    @rule(culprit=VALIDATORS, reporter=EVERYBODY, view=st.integers(1, 2), is_real=st.booleans(), again=st.booleans())
    def accuse(self, culprit: PrivateKey, reporter: PrivateKey, view: int, is_real: bool, again: bool) -> None:
        """Report a validator, which may try to come back."""
        if sum(v.is_able for v in map(self.players.state.validator, self._members()) if v) > 2:
            self.players.send(reporter, self.players.evidence(culprit, view, is_real))
            if again:
                self.players.block()
                self.players.send(culprit, RegisterValidator(ONIONS[culprit.account].tip))
                self.players.send(culprit, Bond(2000))

    def _members(self) -> list[bytes]:
        return [account for account, _ in self.players.state.validators().members]

    @rule(key=EVERYBODY, payload=valid(Payload))
    def junk(self, key: PrivateKey, payload: Payload) -> None:
        """Send any payload at all, of whatever kinds there are."""
        if key not in KEYS[:2] or not isinstance(payload, RegisterValidator):
            self.players.send(key, payload)

    @rule(
        key=EVERYBODY,
        off=st.sampled_from([FRAUD, FRAUD, SMALL, 0.0]),
        how=st.sampled_from(["work", "lie", "tell", "miss", "show", "believe", "bear"]),
    )
    def turn(self, key: PrivateKey, off: float, how: str) -> None:
        """Let somebody become dishonest, or honest again."""
        players = self.players
        kinds = {"tell": "contradicts", "miss": "misses", "show": "shows", "believe": "believes"}
        kinds["bear"] = "tolerates"
        if how in kinds:
            setattr(players, kinds[how], getattr(players, kinds[how]) ^ {key.account})
        else:
            (players.deviation if how == "work" else players.lies)[key.account] = off

    @rule(key=EVERYBODY)
    def fall_silent(self, key: PrivateKey) -> None:
        """Let somebody stop or start answering."""
        self.players.silent ^= {key.account}

    @rule(index=INDEX, key=EVERYBODY, step=st.integers(1, 6), cells=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    def claim(self, index: int, key: PrivateKey, step: int, cells: list[int]) -> None:
        """Claim some cells, allowed or not."""
        if self.task(index) in self.players.swarms:
            self.players.claim_one(self.task(index), key, step, tuple(cells))

    @rule(seed=SEEDS)
    def answer_falsely(self, seed: int) -> None:
        """Let false openings and reveals come."""
        self.players.answer_falsely(random.Random(seed))

    @rule(
        count=st.integers(1, 4), steps=st.integers(0, 3), share=st.sampled_from([0.0, 0.5, 1.0, 1.0]), seed=SEEDS,
        workers=st.integers(0, 8), absent=st.sets(VALIDATORS, max_size=1),
    )  # fmt: skip
    def work(self, count: int, steps: int, share: float, seed: int, workers: int, absent: set[PrivateKey]) -> None:
        """Let everybody work for some blocks."""
        dice = random.Random(digest("dice", seed.to_bytes(4, "big")))
        for _ in range(count):
            self.players.answer_all(dice, share)
            self.players.claim_all(steps)
            self.players.apply_all(KEYS[:workers])
            self.players.block(frozenset(key.account for key in absent))

    @rule(
        cheats=st.sets(st.integers(0, 6), max_size=2), liars=st.sets(st.integers(0, 6), max_size=2), seed=SEEDS,
        mute=st.sets(st.integers(0, 6), max_size=1),
    )  # fmt: skip
    def campaign(self, cheats: set[int], liars: set[int], seed: int, mute: set[int]) -> None:
        """Let everybody work long enough for verdicts, some of them cheating or silent."""
        dice, off = random.Random(seed), {0: FRAUD, 1: SMALL, 2: FRAUD}[seed % 3]
        self.players.deviation.update({KEYS[index].account: off for index in cheats})
        self.players.lies.update({KEYS[index].account: FRAUD for index in liars})
        self.players.apply_all(KEYS[:7])
        self.players.block()
        self.players.silent.update(KEYS[index].account for index in mute)
        for _ in range(12):
            self.players.renew_all()
            self.players.answer_all(dice)
            self.players.claim_all(2)
            self.players.block()
        players = self.players
        told = (players.contradicts, players.misses, players.shows, players.believes, players.tolerates)
        for kept in (players.deviation, players.lies, *told, players.silent):
            kept.clear()

    @rule(mute=st.sets(st.integers(0, 6), min_size=1, max_size=3), seed=SEEDS)
    def silence(self, mute: set[int], seed: int) -> None:
        """Let some claim nothing until steps have to settle without them."""
        dice = random.Random(seed)
        self.players.apply_all(KEYS[:7])
        self.players.block()
        self.players.silent.update(KEYS[index].account for index in mute)
        for _ in range(9):
            self.players.renew_all()
            self.players.answer_all(dice)
            self.players.claim_all(1)
            self.players.block()
        self.players.silent.clear()

    @rule(count=st.integers(1, 6))
    def idle(self, count: int) -> None:
        """Let time pass."""
        for _ in range(count):
            self.players.block()

    def teardown(self) -> None:
        """Let everything end."""
        self.players.wind_down()
