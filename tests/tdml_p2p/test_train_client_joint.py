"""Runs over a real network whose stages' steps depend on each other: tied embeddings, and a step that fails."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_kit import Client, settings, swarm
from transformers import AutoModelForCausalLM

from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import UserError
from tdml_p2p.swarm.preparation import prepare
from trainer.checkpoint import resume, whole_tensors
from trainer.joint import check_tied
from trainer.local import train_locally, whole
from trainer.stage import Backward, CellKey, Stage

pytestmark = [pytest.mark.trio, pytest.mark.slow]

TIED = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


def tied(folder: Path) -> TrainConfig:
    train = settings(folder, steps=4, clip=0.1)
    Path(train.model).write_text(json.dumps(TIED))
    return train


async def test_a_tied_model_on_two_stages_is_the_model_of_one_process(tmp_path: Path) -> None:
    train = tied(tmp_path)
    async with swarm(tmp_path) as peers:
        assert await Client(train, peers[0].invite).run() == 0
    saved = resume(train.out)
    check_tied(saved.manifest, saved.states)
    fresh = prepare(replace(train, out=tmp_path / "plan"))
    assert fresh.manifest.tied
    expected = train_locally(fresh.manifest, fresh.batches, train.steps)
    reference = whole_tensors(whole(fresh.manifest), (expected,))
    for name, tensor in whole_tensors(saved.manifest, saved.states).items():
        assert float((tensor - reference[name]).norm()) <= 1e-5 * float(reference[name].norm())
    model = AutoModelForCausalLM.from_pretrained(train.out)
    assert model.lm_head.weight is model.transformer.wte.weight


async def test_a_step_that_is_not_finite_ends_the_run_with_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, backward = settings(tmp_path, steps=6), Stage.backward

    def poisoned(stage: Stage, cell: CellKey, gy: torch.Tensor | None) -> Backward:
        gx, gw = backward(stage, cell, gy)
        if cell.step == 3 and stage.spec.is_first:
            gw[0] = math.nan
        return Backward(gx, gw)

    monkeypatch.setattr(Stage, "backward", poisoned)
    async with swarm(tmp_path) as peers:
        client = Client(train, peers[0].invite)
        with pytest.raises(UserError, match=r"in step 3, stage 0, the gradient of micro-batch . is not finite"):
            await client.run()
    assert client.of("step") == [1, 2]
    saved = resume(train.out)
    assert saved.step == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in whole_tensors(saved.manifest, saved.states).values())
