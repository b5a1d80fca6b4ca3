"""The parts of a training client without a network: settings, which task to go on with, saving, the chain's copy."""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import trio
import trio.testing
from train_kit import settings

from chain.keys import PrivateKey
from chain.transactions import CloseTask, Payload, PostTask
from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.peer import Peer
from tdml_p2p.swarm import saving
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from tdml_p2p.swarm.journal import NAME, Journal, read_journal, write_journal
from tdml_p2p.swarm.posting import Posted, Poster
from tdml_p2p.swarm.preparation import Prepared, prepare
from tdml_p2p.swarm.saving import History, Saver, copy_chain
from trainer.checkpoint import Checkpoint, resume, save
from trainer.content import address_of
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import Members, StepDone
from trainer.manifest import TaskManifest, encode_manifest
from trainer.state import StageState, initial_state
from trainer.tokens import train_tokenizer
from trainer.worker_ports import StateUnavailable

KEY = PrivateKey(bytes(range(32)))
TASK = "0c" * 32

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_PAUSES", (0.0, 0.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": 8}, "has none"),
        ({"redundancy": 2, "replicas": 3}, "no clear majority"),
        ({"redundancy": 3, "replicas": 2}, "as many replicas"),
        ({"redundancy": 3, "replicas": 3, "private": True}, "Redundancy and a private run"),
        ({"redundancy": 3, "replicas": 3, "compress": "int8"}, "Redundancy and compression"),
        ({"compress": "topk"}, "compression 'topk'"),
        ({"precision": "fp16"}, "precision"),
        ({"kernel": "ab" * 32}, "--kernel"),
        ({"precision": "bf16", "kernel": "ab"}, "kernel class"),
        ({"save_every": -1}, "--save-every"),
        ({"trace": Path("/dev/null/trace.json")}, "cannot be written"),
        ({"trace": Path("/")}, "cannot be written"),
        ({"data": ()}, "no data"),
    ],
)
def test_what_this_release_does_not_do_is_refused_as_misuse(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        prepare(settings(tmp_path, **changes))
    assert caught.value.exit_code == USAGE
    assert caught.value.hint


def states_of(manifest: TaskManifest, step: int) -> tuple[StageState, ...]:
    fresh = [initial_state(manifest, index) for index in range(manifest.stages)]
    return tuple(StageState(step, state.weights + step, state.m, state.v) for state in fresh)


def planned(train: TrainConfig) -> Prepared:
    """Return the run as it would be started anew."""
    return prepare(replace(train, resume=False, out=train.out.parent / "plan"))


def saved(train: TrainConfig, step: int, **more: Any) -> Prepared:
    """Save a checkpoint and return the run that resumes from it."""
    prepared = planned(train)
    states = states_of(prepared.manifest, step)
    save(Checkpoint(prepared.manifest, states, prepared.tokenizer, **{"task": TASK, **more}), train.out)
    return prepare(replace(train, resume=True))


@pytest.mark.parametrize("changes", [{"validation": "0.2"}, {"max_data": 4000}, {"data": "more"}])
def test_a_run_is_not_resumed_on_other_data(changes: dict[str, Any], tmp_path: Path) -> None:
    train = settings(tmp_path, validation="0.1")
    prepared = prepare(train)
    states = states_of(prepared.manifest, 2)
    of_data = {"data": prepared.batches.data, "tokens": prepared.batches.tokens}
    save(Checkpoint(prepared.manifest, states, prepared.tokenizer, **of_data), train.out)
    resumed = prepare(replace(train, resume=True))
    assert resumed.checkpoint is not None
    assert (resumed.batches.data, resumed.batches.tokens) == (prepared.batches.data, prepared.batches.tokens)
    if "data" in changes:
        (tmp_path / "corpus.txt").write_text("The corpus has been edited.\n" * 200)
        changes = {}
    with pytest.raises(UserError, match="is not what the run") as caught:
        prepare(replace(train, resume=True, **changes))
    assert caught.value.exit_code == USAGE
    assert "--validation" in caught.value.hint


def test_a_run_that_was_saved_is_not_overwritten_by_another(tmp_path: Path) -> None:
    train = settings(tmp_path)
    saved(train, 3)
    with pytest.raises(UserError, match="another run") as caught:
        prepare(train)
    assert (caught.value.exit_code, "--resume" in caught.value.hint) == (USAGE, True)


def test_what_validates_is_a_share_or_a_path_of_its_own(tmp_path: Path) -> None:
    train = settings(tmp_path)
    assert prepare(train).validation is None
    share = prepare(replace(train, validation="0.2"))
    assert share.validation is not None
    assert share.validation.count == 2
    assert share.batches.tokens < prepare(train).batches.tokens
    other = tmp_path / "other.txt"
    other.write_text("Text of another kind.\n" * 20)
    path = prepare(replace(train, validation=str(other)))
    assert path.validation is not None
    assert bytes(path.validation.batch(0).tokens.flatten().tolist())[:4] == b"Text"
    assert path.batches.tokens == prepare(train).batches.tokens
    for wrong, said in ((str(tmp_path / "corpus.txt"), "among the text"), (str(tmp_path), "among"), ("1.5", "share")):
        with pytest.raises(UserError, match=said):
            prepare(replace(train, validation=wrong))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    train = settings(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    for name, data in train_tokenizer(["some words and more words"] * 9, 280).files(32).items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"The tokenizer has \d+ ids, the model a vocabulary of 257"):
        prepare(replace(train, model=str(folder)))


@dataclass
class FakeChain:
    """A ledger that knows at most one former task and takes every transaction."""

    task: SimpleNamespace | None = None
    sent: list[Payload] = field(default_factory=list)
    params: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            floor_rate=500, step_share=2500, colluding_share=2500, faucet_grant=0, block_interval_ms=1000
        )
    )

    def open_tasks(self) -> list[SimpleNamespace]:
        posted = [p for p in self.sent if isinstance(p, PostTask)]
        found = [SimpleNamespace(id=p.manifest, manifest=p.manifest, client=KEY.account, posted_at=8) for p in posted]
        return [*found, *([self.task] if self.task is not None and self.task.is_open else [])]

    def account(self, _: bytes) -> SimpleNamespace:
        return SimpleNamespace(balance=10**9, granted=True)

    async def submit(self, payload: Payload) -> SimpleNamespace:
        await trio.lowlevel.checkpoint()
        self.sent.append(payload)
        return SimpleNamespace(ok=True)

    def peer(self) -> Peer:
        async def put(data: bytes) -> bytes:
            return address_of(data)

        state = SimpleNamespace(
            task=lambda name: self.task if name.hex() == TASK else None,
            open_tasks=self.open_tasks,
            params=self.params,
            account=self.account,
            height=7,
        )
        blobs = SimpleNamespace(put=put)
        peer = SimpleNamespace(
            engine=SimpleNamespace(state=state),
            key=KEY,
            name="me",
            network=SimpleNamespace(blobs=blobs),
            submit=self.submit,
        )
        return cast(Peer, peer)


def former(generation: int = 0, settled: int = 0, is_open: bool = True, client: bytes = KEY.account) -> SimpleNamespace:
    return SimpleNamespace(
        id=bytes.fromhex(TASK),
        generation=generation,
        settled=settled,
        is_open=is_open,
        client=client,
        manifest=bytes(32),
        posted_at=5,
    )


async def opened(train: TrainConfig, prepared: Prepared, chain: FakeChain) -> tuple[Posted | None, list[Any]]:
    events: list[Any] = []
    posted = await Poster(chain.peer(), train.out, 1, events.append).open(prepared)
    return posted, events


@pytest.mark.trio
async def test_a_run_that_was_interrupted_goes_on_in_its_task(tmp_path: Path) -> None:
    train = settings(tmp_path)
    chain = FakeChain(former(generation=2))
    posted, events = await opened(train, saved(train, 4, generation=2, is_verified=False), chain)
    assert posted is not None
    assert (posted.task.hex(), posted.resume) == (TASK, (2, 4))
    assert chain.sent == []
    assert events == [{"event": "posted", "task": TASK, "resumed": True, "step": 4}]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("task", "closes"),
    [
        (former(settled=5), True),
        (former(generation=1), True),
        (former(is_open=False), False),
        (former(client=bytes(32)), False),
        (None, False),
    ],
)
async def test_else_a_new_task_takes_over_the_steps_that_are_left(
    task: SimpleNamespace | None, closes: bool, tmp_path: Path
) -> None:
    train = settings(tmp_path)
    chain = FakeChain(task)
    posted, events = await opened(train, saved(train, 4), chain)
    assert posted is not None
    assert [type(payload) for payload in chain.sent] == ([CloseTask] if closes else []) + [PostTask]
    manifest = posted.prepared.manifest
    assert (manifest.start, manifest.steps, posted.resume) == (4, 2, None)
    assert manifest.initial == tuple(state.root.hex() for state in posted.prepared.states)
    post = chain.sent[-1]
    assert isinstance(post, PostTask)
    assert (post.steps, post.manifest) == (2, manifest.address)
    assert [event["event"] for event in events] == ["posted"]


@pytest.mark.trio
async def test_a_new_task_starts_from_what_was_verified_if_anything_was(tmp_path: Path) -> None:
    train = settings(tmp_path)
    saved(train, 3)
    prepared = saved(train, 5, generation=0, is_verified=False)
    posted, _ = await opened(train, prepared, FakeChain(former(generation=1)))
    assert posted is not None
    assert posted.prepared.manifest.start == 3
    posted, _ = await opened(train, prepared, FakeChain(former(settled=5, is_open=False)))
    assert posted is not None
    assert posted.prepared.manifest.start == 5


@pytest.mark.trio
async def test_without_a_verified_state_the_workers_are_asked_or_the_person_is_told(tmp_path: Path) -> None:
    train = settings(tmp_path)
    prepared = saved(train, 5, generation=0, is_verified=False)
    posted, events = await opened(train, prepared, FakeChain(former(generation=1, settled=2)))
    assert posted is not None
    assert (posted.task.hex(), posted.resume, events[-1]["step"]) == (TASK, None, 2)
    posted, events = await opened(train, prepared, FakeChain())
    assert posted is not None
    assert (posted.prepared.manifest.start, [event["event"] for event in events]) == (5, ["unverified", "posted"])


@pytest.mark.trio
async def test_the_ends_of_a_private_run_are_asked_of_nobody(tmp_path: Path) -> None:
    """After a rollback workers hold what is verified, but of the client's ends only the saved state is left."""
    train = settings(tmp_path, private=True)
    prepared = saved(train, 5, generation=0, is_verified=False)
    posted, events = await opened(train, prepared, FakeChain(former(generation=1, settled=2)))
    assert posted is not None
    assert (posted.prepared.manifest.start, [event["event"] for event in events]) == (5, ["unverified", "posted"])
    saved(train, 3)
    posted, events = await opened(train, prepared, FakeChain(former(generation=1, settled=2)))
    assert posted is not None
    assert (posted.prepared.manifest.start, [event["event"] for event in events]) == (3, ["posted"])


@pytest.mark.trio
@pytest.mark.parametrize("is_private", [True, False])
async def test_a_private_run_pays_for_seats_only_and_keeps_the_tokenizer_of_its_text(
    is_private: bool, tmp_path: Path
) -> None:
    train = settings(tmp_path, private=is_private, stages=1)
    tokenizer = train_tokenizer(["some words and more words"] * 9, 280)
    chain, put = FakeChain(None), []
    peer = chain.peer()

    async def keep(data: bytes) -> bytes:
        put.append(data)
        return address_of(data)

    peer.network.blobs.put = keep  # type: ignore[method-assign,assignment]
    prepared = replace(prepare(train), tokenizer=tokenizer)
    assert await Poster(peer, train.out, 1, lambda _: None).open(prepared) is not None
    (post,) = chain.sent
    assert isinstance(post, PostTask)
    assert (post.stages, post.escrow) == (1, train.steps * (2 * train.microbatches + 1))
    assert (tokenizer.json in put) == (not is_private)
    assert encode_manifest(prepared.manifest) in put


@pytest.mark.trio
async def test_a_run_whose_steps_are_all_done_only_closes_its_task(tmp_path: Path) -> None:
    train = settings(tmp_path)
    chain = FakeChain(former())
    posted, _ = await opened(train, saved(train, train.steps), chain)
    assert posted is None
    assert chain.sent == [CloseTask(bytes.fromhex(TASK))]


class FakeSwarm:
    """Coordinator and governor of a swarm that settles as tests say; `lacking` steps cannot be fetched."""

    def __init__(self, train: TrainConfig, step: int = 4) -> None:
        self.step = step
        self.lacking: set[int] = set()
        self.late: list[int] = []
        self.members = Members(0, 0, ())
        self.settles: Callable[[], None] = lambda: None
        self.task = SimpleNamespace(generation=0, settled=0)
        self._manifest = planned(train).manifest

    async def fetch_states(self, step: int) -> tuple[StageState, ...]:
        await trio.lowlevel.checkpoint()
        if step in self.late:
            self.late.remove(step)
            raise StateUnavailable("not committed yet")
        if step in self.lacking:
            raise StateUnavailable("gone")
        return states_of(self._manifest, step)

    def current(self) -> Members:
        return self.members

    async def settled(self, _: int) -> Members:
        await trio.lowlevel.checkpoint()
        self.settles()
        return self.members


def saver_of(train: TrainConfig, events: list[dict[str, Any]]) -> Saver:
    posted = Posted(bytes.fromhex(TASK), planned(train))
    return Saver(train.out, posted, History({step: 1.0 / step for step in range(1, 7)}, {2: 1.5}), events.append)


async def idle(saver: Saver) -> None:
    with trio.fail_after(20):
        while not saver._due.statistics().tasks_waiting_receive:
            await trio.sleep(0.005)


async def save_periodically(saver: Saver, fake: FakeSwarm, *steps: int, every: int = 2) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(saver.run, cast(Coordinator, fake), cast(ChainGovernor, fake))
        for step in steps:
            await idle(saver)
            saver.note(StepDone(step, 0, 1.0, 1, 1.0, 0.0), every)
        await idle(saver)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_every_so_many_steps_a_verified_state_is_saved_but_not_the_last(tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    await save_periodically(saver_of(train, events), FakeSwarm(train), 1, 2, 3, 6)
    assert events == [{"event": "saved", "out": str(train.out), "step": 2}]
    checkpoint = resume(train.out)
    assert (checkpoint.step, checkpoint.task, checkpoint.generation, checkpoint.is_verified) == (2, TASK, -1, True)
    assert [step for step, _ in checkpoint.losses] == [1, 2]


@pytest.mark.trio
async def test_a_state_whose_commit_is_on_its_way_is_asked_for_again(tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    fake = FakeSwarm(train)
    fake.late = [2, 2]
    await save_periodically(saver_of(train, events), fake, 2)
    assert [event["step"] for event in events] == [2]


@pytest.mark.trio
@pytest.mark.parametrize("trouble", ["rolled back", "no holder", "closed", "off"])
async def test_a_state_that_is_not_verified_or_not_there_is_left_out(trouble: str, tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    fake = FakeSwarm(train)

    def settles() -> None:
        if trouble == "closed":
            raise TaskEnded("closed")
        if trouble == "rolled back":
            fake.members = Members(1, 0, ())

    fake.settles = settles
    fake.lacking = {2} if trouble == "no holder" else set()
    await save_periodically(saver_of(train, events), fake, 2, every=0 if trouble == "off" else 2)
    assert events == []
    assert not train.out.exists()


@pytest.mark.trio
async def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    saver, fake = saver_of(train, events), FakeSwarm(train)
    train.out.write_text("in the way")
    await save_periodically(saver, fake, 2)
    train.out.unlink()
    await save_periodically(saver, fake, 4)
    assert [(event["event"], event.get("step")) for event in events] == [("not-saved", None), ("saved", 4)]


@pytest.mark.trio
async def test_an_interruption_saves_the_newest_state_that_can_be_had(tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    saver, fake = saver_of(train, events), FakeSwarm(train)
    ports = cast(Coordinator, fake), cast(ChainGovernor, fake)
    await saver.save_interrupted(*ports)
    newest = resume(train.out)
    assert (newest.step, newest.generation, newest.is_verified) == (4, 0, False)
    fake.lacking, fake.task.settled = {4}, 3
    await saver.save_interrupted(*ports)
    before = resume(train.out)
    assert (before.step, before.generation, before.is_verified) == (3, -1, True)
    fake.lacking = {3, 4}
    await saver.save_interrupted(*ports)
    assert [event["step"] for event in events] == [4, 3, 3]
    with pytest.raises(UserError, match="did not give their state"):
        await saver_of(train, events).save_interrupted(*ports)


@pytest.mark.trio
async def test_a_new_task_is_saved_with_its_start_so_that_it_is_never_orphaned(tmp_path: Path) -> None:
    train, events = settings(tmp_path), []
    posted = Posted(b"\x0d" * 32, saved(train, 4).over_rest_of(resume(train.out)))
    await Saver(train.out, posted, History({}, {}), events.append).save_start()
    checkpoint = resume(train.out)
    assert (checkpoint.task, checkpoint.step, checkpoint.manifest.start) == ("0d" * 32, 4, 4)
    events.clear()
    await Saver(train.out, replace(posted, resume=(0, 0)), History({}, {}), events.append).save_start()
    assert events == []


@pytest.mark.trio
@pytest.mark.parametrize(("kept", "expected"), [(0, 4), (2, 4), (5, 5)])
async def test_who_loses_a_stage_goes_on_from_the_newer_of_what_it_keeps_and_what_it_saved(
    kept: int, expected: int, tmp_path: Path
) -> None:
    train = settings(tmp_path)
    saver = saver_of(train, [])
    states = states_of(planned(train).manifest, kept) if kept else ()
    before = await saver.newest(states)
    assert (0 if before is None else before.step) == kept
    await save_periodically(saver, FakeSwarm(train), 4)
    newest = await saver.newest(states)
    assert newest is not None
    assert newest.step == expected
    assert newest.is_verified
    assert newest.states[0].root == states_of(newest.manifest, expected)[0].root
    of_another = Saver(train.out, Posted(b"\x0d" * 32, planned(train)), History({}, {}), print)
    assert await of_another.newest(()) is None


def growing_chain(path: Path) -> Callable[[], str]:
    """Return what adds a block to a database, which stays open, and seals it."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("pragma journal_mode = wal")
    database.execute("create table blocks (height)")

    def seal() -> str:
        database.execute("insert into blocks select count(*) + 1 from blocks")
        return f"{database.execute('select max(height) from blocks').fetchone()[0]}:{'ab' * 32}"

    return seal


@pytest.mark.trio
async def test_every_checkpoint_comes_with_the_chain_that_proves_it_even_if_nothing_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, events, source = settings(tmp_path), list[dict[str, Any]](), tmp_path / "chain.db"
    posted, history = Posted(bytes.fromhex(TASK), planned(train)), History({1: 1.0, 2: 0.5}, {})
    proven: list[tuple[int, int]] = []

    def save_and_look(checkpoint: Checkpoint, folder: Path) -> None:
        save(checkpoint, folder)
        copy = sqlite3.connect(f"file:{folder / 'chain.db'}?mode=ro", uri=True)
        named = int(checkpoint.sealed_by.split(":")[0])
        proven.append((named, copy.execute("select max(height) from blocks").fetchone()[0]))
        copy.close()

    monkeypatch.setattr(saving, "save", save_and_look)
    saver = Saver(train.out, posted, history, events.append, growing_chain(source), source)
    await save_periodically(saver, FakeSwarm(train), 2, 4)
    assert proven == [(1, 1), (2, 2)]
    assert "block 2 is the newest" in (train.out / "README.md").read_text()
    assert [event["event"] for event in events] == ["saved", "saved"]


@pytest.mark.trio
async def test_a_chain_that_cannot_be_copied_costs_no_checkpoint(tmp_path: Path) -> None:
    train, events = settings(tmp_path), list[dict[str, Any]]()
    posted = Posted(bytes.fromhex(TASK), planned(train))
    saver = Saver(train.out, posted, History({}, {}), events.append, str, tmp_path / "nowhere.db")
    await save_periodically(saver, FakeSwarm(train), 2)
    assert [(event["event"], "could not be copied" in str(event.get("reason"))) for event in events] == [
        ("not-saved", True),
        ("saved", False),
    ]
    assert resume(train.out).step == 2


@pytest.mark.trio
async def test_the_chain_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    source, out = tmp_path / "chain.db", tmp_path / "out"
    out.mkdir()
    with sqlite3.connect(source) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table blocks (height)")
        database.execute("insert into blocks values (7)")
    database.close()
    await copy_chain(source, out)
    copy = sqlite3.connect(f"file:{out / 'chain.db'}?mode=ro", uri=True)
    assert copy.execute("select height from blocks").fetchall() == [(7,)]
    copy.close()
    assert [path.name for path in out.iterdir()] == ["chain.db"]
    before = (out / "chain.db").read_bytes()
    source.write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="could not be copied") as caught:
        await copy_chain(source, out)
    assert "model itself is complete" in caught.value.hint
    assert (out / "chain.db").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["chain.db"]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("journal", "closes"),
    [
        (Journal("", 3, TASK), True),
        (Journal(bytes(32).hex(), 4), True),
        (Journal(bytes(32).hex(), 5), False),
        (Journal("11" * 32, 4), False),
        (None, False),
    ],
)
async def test_the_task_of_a_run_that_was_killed_before_its_first_checkpoint_is_closed(
    journal: Journal | None, closes: bool, tmp_path: Path
) -> None:
    train = settings(tmp_path)
    prepared = prepare(train)
    if journal is not None:
        write_journal(train.out, journal)
    chain = FakeChain(former())
    posted, events = await opened(train, prepared, chain)
    assert posted is not None
    assert [type(payload) for payload in chain.sent] == ([CloseTask] if closes else []) + [PostTask]
    assert [event["event"] for event in events] == (["abandoned"] if closes else []) + ["posted"]
    assert read_journal(train.out) == Journal(prepared.manifest.address.hex(), 7, posted.task.hex())


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"manifest":"","height":1,"task":"zz"}'])
def test_a_damaged_journal_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(data)
    assert read_journal(tmp_path) is None
