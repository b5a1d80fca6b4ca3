"""Training from Python: the loop is the caller's, and the README's examples run as they stand there."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from train_kit import LOCAL, settings, swarm

import tdml_p2p
from tdml_p2p import SwarmRun, SwarmStep, TrainConfig, api, train_on_swarm
from tdml_p2p.config import PeerConfig
from tdml_p2p.errors import UserError
from trainer.checkpoint import resume

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
PEER = PeerConfig(listen=LOCAL, status_port=-1, log_level="error")


@pytest.mark.trio
async def test_the_loop_over_a_swarms_steps_can_stop_and_go_on(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=6, stages=1, validation="0.2", eval_every=3)
    events: list[dict[str, Any]] = []
    async with swarm(tmp_path, workers=1) as (founder, *_):
        steps: list[SwarmStep] = []
        async with SwarmRun(train, founder.invite, PEER, events.append) as run:
            async for step in run:
                steps.append(step)
                if step.step == 3:
                    run.stop()
        assert run.code == 130
        assert [step.step for step in steps][:3] == [1, 2, 3]
        assert steps[2].validation_loss is not None
        assert sum(share["cells"] for share in steps[0].shares) == train.microbatches
        done = resume(train.out).step
        async with SwarmRun(replace(train, resume=True), founder.invite, PEER) as run:
            rest = [step.step async for step in run]
        assert rest == list(range(done + 1, 7))
        assert run.code == 0
    assert [event["event"] for event in events][:2] == ["posted", "formed"]
    assert resume(train.out).step == 6


@pytest.mark.trio
async def test_what_goes_wrong_is_raised_to_the_caller(tmp_path: Path) -> None:
    train = settings(tmp_path)
    with pytest.raises(UserError, match="no network"):
        async with SwarmRun(train, peer=PEER):
            pass
    with pytest.raises(UserError, match="no file or folder"):
        async with SwarmRun(replace(train, data=(tmp_path / "gone",)), "invite", PEER):
            pass
    async with swarm(tmp_path, workers=0) as (founder,):
        with pytest.raises(ZeroDivisionError):
            async with SwarmRun(train, founder.invite, PEER):
                _ = 1 // 0


@pytest.mark.trio
async def test_without_an_event_loop_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PeerConfig", partial(PeerConfig, listen=LOCAL))
    train = settings(tmp_path, steps=2, stages=1)
    steps: list[int] = []
    async with swarm(tmp_path, workers=1) as (founder, *_):
        run = partial(train_on_swarm, train, founder.invite, lambda step: steps.append(step.step))
        assert await trio.to_thread.run_sync(run) == train.out
    assert steps == [1, 2]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    book = tmp_path / "book.txt"
    book.write_text("".join(f"It was day {number}, and {number * number % 97} apples fell.\n" for number in range(900)))
    return book


def shortened(block: str) -> str:
    """Return an example with few and small steps."""
    few = block.replace("steps=20", "steps=3, sequence=16")
    assert few != block
    return few


def test_the_readmes_local_example_runs(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    exec(compile(shortened(BLOCKS[0]), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[:3]] == [[str(n), "loss"] for n in (1, 2, 3)]
    assert "validation loss" in said
    assert "It was" in said


@pytest.mark.trio
async def test_the_readmes_swarm_example_runs(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PeerConfig", partial(PeerConfig, listen=LOCAL))
    async with swarm(tmp_path, workers=2) as (founder, *_):
        code = compile(shortened(BLOCKS[1]), "README.md", "exec")
        await trio.to_thread.run_sync(exec, code, {"INVITE": founder.invite})
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert len(lines) == 3
    assert resume(tmp_path / "swarm-out").step == 3


def test_names_that_are_not_offered_are_none() -> None:
    assert set(tdml_p2p.__all__) == {"SwarmRun", "SwarmStep", "TrainConfig", "train_on_swarm"}
    assert TrainConfig is tdml_p2p.config.TrainConfig
    with pytest.raises(AttributeError, match="no attribute"):
        _ = tdml_p2p.nothing  # type: ignore[attr-defined]
