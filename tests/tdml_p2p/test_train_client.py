"""Training runs that end early and go on: killed, interrupted, with their task or without it."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_kit import MODEL, Client, settings, swarm, worker
from transformers import LlamaConfig, LlamaForCausalLM

from chain.queries import open_reader
from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import UserError
from tdml_p2p.peer import open_peer
from tdml_p2p.swarm.preparation import prepare
from trainer.checkpoint import resume, whole_tensors
from trainer.local import train_locally, whole
from trainer.monitors import Monitors, Seen, Suspicion, Why
from trainer.state import state_of_weights
from trainer.tokens import byte_tokenizer

pytestmark = pytest.mark.slow


def assert_as_undisturbed(train: TrainConfig) -> None:
    """The folder holds what one process makes of the same run."""
    fresh = prepare(replace(train, resume=False, out=train.out.parent / "plan"))
    saved = resume(train.out)
    assert saved.step == train.steps
    expected = train_locally(fresh.manifest, fresh.batches, train.steps)
    reference = whole_tensors(whole(fresh.manifest), (expected,))
    for name, tensor in whole_tensors(saved.manifest, saved.states).items():
        assert float((tensor - reference[name]).norm() / reference[name].norm()) < 1e-5
    assert [step for step, _ in saved.losses] == list(range(1, train.steps + 1))


def audits_passed(database: Path, task: str) -> int:
    with closing(open_reader(database).store) as store:
        return sum(event.data["task"] == task for _, event in store.events(1, 1 << 40, ["passed"]))


async def test_a_killed_run_goes_on_from_its_newest_verified_checkpoint(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=24, save_every=3)

    def kill(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            client.crash()

    async with swarm(tmp_path) as peers:
        first = Client(train, peers[0].invite, kill)
        assert await first.run() is None
        (saved,) = first.of("saved")
        assert saved % 3 == 0
        assert resume(train.out).step == saved
        assert resume(train.out).is_verified
        second = Client(replace(train, resume=True), peers[0].invite)
        assert await second.run() == 0
        assert second.of("posted") == [saved]
        assert second.of("posted", "task") != first.of("posted", "task")
        assert second.of("step")[0] == saved + 1
        assert second.of("step", "faults")[-1] == 0
        old = peers[0].engine.state.task(bytes.fromhex(first.of("posted", "task")[0]))
        assert old is None or not old.is_open
    assert audits_passed(train.out / "chain.db", second.of("posted", "task")[0]) > 0
    assert_as_undisturbed(train)


async def test_an_interrupted_run_goes_on_at_the_next_step_with_workers_that_start_anew(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=8, stages=1, save_every=0, validation="0.2", eval_every=3)

    def interrupt(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            assert client.client is not None
            client.client.interrupt()

    async with swarm(tmp_path, workers=0) as (founder,):
        first, second = Client(train, founder.invite, interrupt), Client(replace(train, resume=True), founder.invite)
        async with open_peer(worker(tmp_path, 0, founder.invite)):
            assert await first.run() == 130
        checkpoint = resume(train.out)
        assert first.of("saved") == [4]
        assert (checkpoint.step, checkpoint.task, checkpoint.generation) == (4, *first.of("posted", "task"), 0)
        async with open_peer(worker(tmp_path, 0, founder.invite)):
            assert await second.run() == 0
    assert second.of("posted", "task") == first.of("posted", "task")
    assert second.of("step") == [5, 6, 7, 8]
    assert_as_undisturbed(train)
    assert (train.out / "chain.db").stat().st_size > 0
    lines = [json.loads(line) for line in (train.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    measured = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    assert [step for step, _ in measured] == [3, 6, 8]
    assert [*zip(second.of("validation"), second.of("validation", "loss"), strict=True)] == measured[1:]
    card = (train.out / "README.md").read_text()
    height, block = re.search(r"height (\d+), block `([0-9a-f]{64})`", card).groups()  # type: ignore[union-attr]
    with closing(open_reader(train.out / "chain.db").store) as store:
        assert store.block(int(height))[0].hash.hex() == block
    assert (train.out / "loss.png").exists()
    assert first.of("posted", "task")[0] in card
    assert checkpoint.data in card


async def test_a_run_that_was_killed_before_anything_was_saved_goes_on_from_its_beginning(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=5, save_every=0)

    def kill(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            client.crash()

    async with swarm(tmp_path) as (founder, *_):
        first = Client(train, founder.invite, kill)
        assert await first.run() is None
        with pytest.raises(UserError, match="these settings are not its own"):
            prepare(replace(train, resume=True, learning_rate=0.5))
        second = Client(replace(train, resume=True), founder.invite)
        assert await second.run() == 0
        assert second.of("abandoned", "task") == first.of("posted", "task")
        assert second.of("step") == [1, 2, 3, 4, 5]
    assert_as_undisturbed(train)
    lines = [json.loads(line) for line in (train.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_there_is_nothing_to_resume_in_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        prepare(settings(tmp_path, resume=True))


async def test_training_on_from_a_model_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).save_pretrained(base)
    for name, data in byte_tokenizer().files(32).items():
        (base / name).write_bytes(data)
    train = settings(tmp_path, steps=3, model=str(base))
    prepared = prepare(train)
    given = whole_tensors(prepared.manifest, prepared.states)
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(given[name], tensor.float())
    async with swarm(tmp_path) as (founder, *_):
        client = Client(train, founder.invite)
        assert await client.run() == 0
    assert client.of("evicted") == []
    uncut = whole(prepared.manifest)
    start = state_of_weights(uncut, 0, given)
    expected = whole_tensors(uncut, (train_locally(uncut, prepared.batches, 3, state=start),))
    for name, tensor in load_file(train.out / "model.safetensors").items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-5
        assert not torch.equal(tensor, given[name])


async def test_an_interruption_before_the_first_step_closes_the_task(tmp_path: Path) -> None:
    train = settings(tmp_path)

    def interrupt(client: Client, event: dict[str, Any]) -> None:
        assert event["event"] == "posted"
        assert client.client is not None
        client.client.interrupt()

    async with swarm(tmp_path, workers=0) as (founder,):
        client = Client(train, founder.invite, interrupt)
        assert await client.run() == 130
        task = founder.engine.state.task(bytes.fromhex(client.of("posted", "task")[0]))
        assert task is None or not task.is_open
    assert not (train.out / "state").exists()


async def test_a_worker_that_a_monitor_names_is_watched_on_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client reports it, has it audited, and trains on as if nothing had been said."""
    train = settings(tmp_path, steps=6)

    def judge(_: Monitors, seen: Seen) -> tuple[Suspicion, ...]:
        return (Suspicion(1, seen.owners[1][0], Why.GRADIENT),) if seen.step == 2 else ()

    monkeypatch.setattr(Monitors, "judge", judge)
    async with swarm(tmp_path) as peers:
        client = Client(train, peers[0].invite)
        assert await client.run() == 0
    (named,) = client.of("suspicious", "peer")
    assert (client.of("suspicious"), client.of("suspicious", "stage")) == ([2], [1])
    with closing(open_reader(train.out / "chain.db").store) as store:
        watched = [event.data["worker"] for _, event in store.events(1, 1 << 40, ["watched"])]
        assert not [event for _, event in store.events(1, 1 << 40, ["convicted", "evicted", "disputed"])]
    assert watched == [named]
    assert_as_undisturbed(train)
