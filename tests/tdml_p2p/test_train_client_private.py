"""Private runs over real sockets: the client's ends, its auditors, its checkpoints, and what leaves it."""

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from safetensors.torch import load_file
from train_kit import Client, settings, swarm, worker

from chain.queries import open_reader
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.demo.faults import faulty_factory
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.muxer import Muxer
from tdml_p2p.peer import open_peer
from tdml_p2p.swarm import preparation
from tdml_p2p.swarm.preparation import Prepared, prepare
from trainer.checkpoint import Checkpoint, resume, save, whole_tensors
from trainer.local import train_locally, whole
from trainer.run import joined
from trainer.state import initial_state
from trainer.tensors import buffer_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _known_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same ends in every preparation, so that a run can be done again alone."""
    monkeypatch.setattr(preparation.secrets, "randbits", lambda bits: 2**bits - 5)


def plan_of(train: TrainConfig) -> Prepared:
    return prepare(replace(train, resume=False, out=train.out.parent / "plan"))


def assert_as_alone(train: TrainConfig) -> None:
    """The folder holds what one process makes of the same run."""
    plan = plan_of(train)
    manifest = plan.manifest
    first, last = plan.ends
    middle = [initial_state(manifest, stage) for stage in manifest.seated]
    alone = train_locally(manifest, plan.batches, train.steps, state=joined(manifest, (first, *middle, last)))
    reference = whole_tensors(whole(manifest), (alone,))
    for name, tensor in load_file(train.out / "model.safetensors").items():
        assert float((tensor - reference[name]).norm() / reference[name].norm()) < 1e-5


@pytest.mark.trio
async def test_a_private_run_is_audited_and_leaves_the_whole_model(tmp_path: Path) -> None:
    train = settings(tmp_path, private=True, steps=8, validation="0.2", eval_every=4, save_every=0, audit_rate=0.6)
    async with swarm(tmp_path, workers=2) as (founder, *_):
        client = Client(train, founder.invite)
        assert await client.run() == 0
        task = founder.engine.state.task(bytes.fromhex(client.of("posted", "task")[0]))
    assert task is None or task.stages == 2
    (stages,) = client.of("formed", "stages")
    assert [len(peers) for peers in stages] == [1, 1, 1, 1]
    assert client.of("evicted") == []
    with closing(open_reader(train.out / "chain.db").store) as store:
        ended = Counter(event.kind for _, event in store.events(1, 1 << 40, ["passed", "disputed", "withheld"]))
    assert ended["passed"] > 8
    assert set(ended) == {"passed"}
    assert len(client.of("validation")) == 2
    assert resume(train.out).manifest.private
    assert "2 stages × 1 replicas, embedding and head at its client." in (train.out / "README.md").read_text()
    assert_as_alone(train)


class Eavesdropper:
    """Every plain byte that one peer hands to its encrypted connections, by connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: dict[tuple[str, int], bytearray] = {}
        write = Muxer._write_frame

        async def heard(muxer: Muxer, data: bytes) -> None:
            peer = str(muxer.secured_conn.get_local_peer())
            self.written.setdefault((peer, id(muxer)), bytearray()).extend(data)
            await write(muxer, data)

        monkeypatch.setattr(Muxer, "_write_frame", heard)

    def of(self, peer: str) -> bytes:
        return b"".join(bytes(data) for (name, _), data in self.written.items() if name == peer)


def rows_of(prepared: Prepared, steps: int) -> list[bytes]:
    """Return the bytes of the first tokens and labels of every sequence of a run."""
    manifest, kept = prepared.manifest, prepared.validation
    batches = [prepared.batches.batch(s, c) for s in range(1, steps + 1) for c in range(manifest.microbatches)]
    batches += [] if kept is None else [kept.batch(index) for index in range(kept.count)]
    return [bytes(buffer_of(row[:4])) for batch in batches for tensor in batch for row in tensor]


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.trio
async def test_no_token_and_no_label_is_written_to_a_socket(
    is_private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same search finds all of them in a run that is not private."""
    train = settings(tmp_path, private=is_private, steps=3, validation="0.2", eval_every=3, audit_rate=1.0)
    corpus = train.data[0].read_bytes()
    ears = Eavesdropper(monkeypatch)
    async with swarm(tmp_path, workers=2) as (founder, *_):
        client = Client(train, founder.invite)
        assert await client.run() == 0
        assert client.client is not None
        written = ears.of(client.client._peer.name)
    assert len(written) > 20_000
    rows = rows_of(plan_of(train), train.steps)
    found = [row in written for row in rows]
    assert not any(found) if is_private else all(found)
    assert corpus[:40] not in written
    kinds = (b"Activation", b"Gradient", b"Relay") if is_private else (b"Tokens", b"Labels", b"Probe")
    others = (b"Tokens", b"Labels", b"Probe") if is_private else (b"Activation", b"Gradient", b"Relay")
    assert all(kind in written for kind in kinds)
    assert not any(kind in written for kind in others)
    assert len(client.of("validation")) == 1


@pytest.mark.trio
async def test_a_cheat_between_the_ends_is_convicted_and_the_run_goes_back(tmp_path: Path) -> None:
    train = settings(tmp_path, private=True, stages=1, replicas=2, steps=4, save_every=0, audit_rate=1.0)
    async with swarm(tmp_path, workers=1, judges=3) as (founder, *_):
        cheat = worker(tmp_path, 7, founder.invite)
        async with open_peer(cheat, stage_factory=faulty_factory("sign-flip", 2)) as peer:
            client = Client(train, founder.invite)
            assert await client.run(240) == 0
            assert client.of("evicted", "peer") == [peer.name]
    assert client.of("rollback", "generation") == [1]
    assert client.of("step", "faults")[-1] >= 1
    assert_as_alone(train)


@pytest.mark.trio
async def test_a_worker_killed_in_a_step_is_replaced(tmp_path: Path) -> None:
    train = settings(tmp_path, private=True, stages=1, replicas=2, steps=10, save_every=0)
    async with swarm(tmp_path, workers=1) as (founder, *_):
        leaving = trio.CancelScope()

        def kill(_: Client, event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 3:
                leaving.cancel()

        async with trio.open_nursery() as nursery:
            await nursery.start(_peer_until, leaving, worker(tmp_path, 8, founder.invite))
            client = Client(train, founder.invite, kill)
            assert await client.run() == 0
    assert client.of("left", "stage")[:1] == [1]
    assert client.of("step") == list(range(1, 11))
    assert_as_alone(train)


@pytest.mark.trio
async def test_a_stage_that_loses_its_only_worker_goes_on_with_a_spare_in_a_new_task(tmp_path: Path) -> None:
    train = settings(tmp_path, private=True, stages=1, steps=20, save_every=0)
    async with swarm(tmp_path, workers=0) as (founder, *_):
        scopes: dict[str, trio.CancelScope] = {}

        def kill(client: Client, event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 9 and not client.of("moved"):
                scopes[client.of("formed", "stages")[0][1][0]].cancel()

        async with trio.open_nursery() as nursery:
            for index in range(2):
                scope = trio.CancelScope()
                scopes[await nursery.start(_peer_until, scope, worker(tmp_path, index, founder.invite))] = scope
            client = Client(train, founder.invite, kill)
            assert await client.run() == 0
            nursery.cancel_scope.cancel()
    assert len(client.of("moved")) == 1
    assert client.of("posted", "task")[0] != client.of("posted", "task")[1]
    assert_as_alone(train)


async def _peer_until(scope: trio.CancelScope, config: PeerConfig, *, task_status: "trio.TaskStatus[str]") -> None:
    with scope:
        async with open_peer(config) as peer:
            task_status.started(peer.name)
            await trio.sleep_forever()


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "interrupted"])
@pytest.mark.trio
async def test_a_private_run_goes_on_where_it_was_left(is_killed: bool, tmp_path: Path) -> None:
    train = settings(tmp_path, private=True, stages=1, steps=24, save_every=3)

    def stop(client: Client, event: dict[str, Any]) -> None:
        if is_killed and event["event"] == "saved":
            client.crash()
        elif not is_killed and event["event"] == "step" and event["step"] == 6:
            assert client.client is not None
            client.client.interrupt()

    async with swarm(tmp_path, workers=1) as (founder, *_):
        first = Client(train, founder.invite, stop)
        assert await first.run() == (None if is_killed else 130)
        saved = resume(train.out)
        second = Client(replace(train, resume=True), founder.invite)
        assert await second.run() == 0
    assert (second.of("posted", "task") == first.of("posted", "task")) == (not is_killed)
    assert second.of("step")[0] == saved.step + 1
    assert second.of("unverified") == []
    assert_as_alone(train)


def test_what_was_not_private_is_not_resumed_as_private(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=4)
    plan = prepare(train)
    states = tuple(initial_state(plan.manifest, stage) for stage in range(2))
    save(Checkpoint(plan.manifest, states, plan.tokenizer), train.out)
    with pytest.raises(UserError, match="is not private") as caught:
        prepare(replace(train, resume=True, private=True))
    assert "--private" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"stages": 3}, "2 layers cannot be cut into 3 stages", "at most 2"),
        ({"stages": 0}, "between the client's two ends", "at least one"),
        ({"stages": 1, "private_layers": 1}, "cannot leave 1 stages a layer each", "--private-layers"),
        ({"private": False, "private_layers": 1}, "of private runs only", "--private"),
    ],
)
def test_a_run_that_cannot_be_private_is_refused(changes: dict[str, Any], said: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?i){said}") as caught:
        prepare(settings(tmp_path, **{"private": True, **changes}))
    assert caught.value.exit_code == USAGE
    assert hint in caught.value.hint


def test_every_run_draws_ends_of_its_own_and_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    train = settings(tmp_path, private=True)
    runs = [plan_of(replace(train, out=tmp_path / str(number) / "out")) for number in range(2)]
    manifests = {run.manifest.address for run in runs}
    assert len(manifests) == 1
    public = [initial_state(runs[0].manifest, stage).root for stage in (0, runs[0].manifest.stages - 1)]
    roots = {state.root for run in runs for state in run.ends} | set(public)
    assert len(roots) == 6
    assert [run.states for run in runs] == [(), ()]
