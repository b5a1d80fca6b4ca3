import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_samples import CONFIG, small_manifest

from trainer import LocalRun, RunSettings
from trainer.checkpoint import Checkpoint, resume, save
from trainer.errors import CheckpointError, DataError, ModelError
from trainer.local import train_locally, whole
from trainer.run import joined
from trainer.stage import build_stage
from trainer.state import StageState, initial_state
from trainer.tokens import byte_tokenizer

SETTINGS = RunSettings(steps=6, batch=2, microbatches=2, sequence=16, seed=7, validation=0.2)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    model, data = tmp_path / "model.json", tmp_path / "book.txt"
    model.write_text(json.dumps({"model_type": "llama", **CONFIG}))
    data.write_text("".join(f"line {number}: {number * number % 97} apples\n" for number in range(200)))
    return model, data


def test_a_run_that_is_stopped_and_resumed_is_the_undisturbed_run(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    run = LocalRun.create(model, data, tmp_path / "out", SETTINGS)
    for done in run:
        if done.step == 3:
            break
    run.save()
    again = LocalRun.resume(tmp_path / "out", [data], SETTINGS)
    assert [done.step for done in again] == [4, 5, 6]
    again.save()
    whole_run = LocalRun.create(str(model), str(data), str(tmp_path / "other"), SETTINGS)
    losses = [done.loss for done in whole_run]
    whole_run.save()
    first, second = resume(tmp_path / "out"), resume(tmp_path / "other")
    assert first.states[0].root == second.states[0].root
    assert [loss for _, loss in first.losses] == losses
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert losses[-1] < losses[0]
    assert isinstance(again.generate("line", tokens=4, temperature=0), str)
    with pytest.raises(CheckpointError, match="another run"):
        LocalRun.create(model, data, tmp_path / "out", SETTINGS)


def test_what_is_kept_is_measured_without_changing_the_training(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [LocalRun.create(*inputs, tmp_path / name, SETTINGS) for name in ("a", "b")]
    measured = [runs[0].evaluate() for _ in runs[0]]
    for _ in runs[1]:
        pass
    assert measured[-1] < measured[0]
    assert len({run._trainer.state.root for run in runs}) == 1
    runs[0].save()
    assert [loss for _, loss in resume(tmp_path / "a").validation] == measured
    blind = LocalRun.create(*inputs, tmp_path / "c", RunSettings(steps=6, batch=2, sequence=16))
    with pytest.raises(DataError) as caught:
        blind.evaluate()
    assert caught.value.reason == "bad-split"


def test_other_data_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    LocalRun.create(*inputs, tmp_path / "out", SETTINGS).save()
    inputs[1].write_text("The book was edited meanwhile.\n" * 99)
    with pytest.raises(DataError) as caught:
        LocalRun.resume(tmp_path / "out", inputs[1], SETTINGS)
    assert caught.value.reason == "data-changed"


def test_a_run_of_a_swarm_goes_on_here(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = small_manifest(stages=3, steps=5)
    states = []
    for index in range(3):
        fresh = initial_state(manifest, index)
        states.append(StageState(2, fresh.weights, fresh.weights * 0.01, fresh.weights.square()))
    state = joined(manifest, states)
    start = initial_state(whole(manifest), 0)
    for found, expected in ((state.weights, 1.0), (state.m, 0.01)):
        assert torch.equal(found, start.weights * expected)
    assert torch.equal(state.v, start.weights.square())
    save(Checkpoint(manifest, tuple(states), byte_tokenizer()), tmp_path / "out")
    run = LocalRun.resume(tmp_path / "out", inputs[1])
    assert [done.step for done in run] == [3, 4, 5]
    expected = train_locally(manifest, run._trainer.data, 5, state=state)
    assert expected.root == run._trainer.state.root
    run.save()
    assert build_stage(resume(tmp_path / "out").manifest, 0).spec.count == 1


def test_adapters_are_trained_and_go_on_without_touching_the_model(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    LocalRun.create(*inputs, base, SETTINGS).save()
    weights = (base / "model.safetensors").read_bytes()
    adapting = replace(SETTINGS, lora=2, lora_targets=("q_proj", "down_proj"), lora_dropout=0.1)
    runs = [LocalRun.create(base, inputs[1], tmp_path / name, adapting) for name in ("a", "b")]
    for done in runs[0]:
        if done.step == 3:
            break
    before = runs[0].evaluate()
    runs[0].save()
    again = LocalRun.resume(tmp_path / "a", inputs[1], adapting)
    assert again.evaluate() == before
    assert [done.step for done in again] == [4, 5, 6]
    assert len(list(runs[1])) == 6
    again.save()
    runs[1].save()
    first, second = resume(tmp_path / "a"), resume(tmp_path / "b")
    assert first.states[0].root == second.states[0].root
    assert first.base == str(base.resolve())
    assert (base / "model.safetensors").read_bytes() == weights
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (tmp_path / "a").iterdir()}
    assert isinstance(again.generate("line", tokens=4, temperature=0), str)
    with pytest.raises(ModelError, match="has none"):
        LocalRun.create(*inputs, tmp_path / "c", adapting)
