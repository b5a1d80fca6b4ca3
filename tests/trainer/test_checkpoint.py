import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_samples import loaded_stages, small_batches, small_manifest
from transformers import AutoModelForCausalLM

from trainer.checkpoint import Checkpoint, resume, save
from trainer.errors import CheckpointError, CheckpointReason
from trainer.generate import generate
from trainer.local import LocalStep, train_locally
from trainer.manifest import OptimizerSettings, complete
from trainer.state import StageState, initial_state
from trainer.tokens import byte_tokenizer


def checkpoint(stages: int = 2, step: int = 3) -> Checkpoint:
    manifest = small_manifest(stages)
    states = []
    for index in range(stages):
        fresh = initial_state(manifest, index)
        states.append(StageState(step, fresh.weights + 0.01 * step, fresh.m + step, fresh.v + step))
    return Checkpoint(manifest, tuple(states), byte_tokenizer(), ((1, 5.5), (2, 5.25), (3, 5.0)))


def test_transformers_opens_the_model_and_agrees_with_the_stages(tmp_path: Path) -> None:
    saved = checkpoint()
    save(saved, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    stages = loaded_stages(saved.manifest)
    tokens, _ = small_batches(saved.manifest).batch(1, 0)
    x = tokens
    for stage, state in zip(stages, saved.states, strict=True):
        stage.load(state.weights)
        x = stage.logits(x)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens.long()).logits, x, rtol=0, atol=1e-5)
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")
    assert "3 of 100" in (tmp_path / "README.md").read_text()


def test_a_run_resumes_from_what_was_saved(tmp_path: Path) -> None:
    saved = checkpoint()
    save(checkpoint(step=2), tmp_path)
    save(saved, tmp_path)
    back = resume(tmp_path)
    assert back.manifest == saved.manifest
    assert [state.root for state in back.states] == [state.root for state in saved.states]
    assert back.losses == saved.losses
    assert back.step == 3
    assert back.tokenizer.name == "bytes"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-0000000003"]


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(checkpoint(), tmp_path / name)
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoint(step=2), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    room, write = [50_000], os.write

    def limited(descriptor: int, data: memoryview) -> int:
        if len(data) > room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= len(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(CheckpointError) as caught:
        save(checkpoint(step=3), tmp_path)
    assert caught.value.reason == CheckpointReason.DISK
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert resume(tmp_path).step == 2


def injected(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> list[int]:
    """Have call `number` of a function of `os` fail; return a list of the calls."""
    original, calls = getattr(os, name), []

    def call(*arguments: object) -> object:
        calls.append(len(calls))
        if len(calls) - 1 == number:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "link"])
@pytest.mark.parametrize("step", [2, 3])
def test_whichever_call_fails_while_saving_the_previous_checkpoint_stays_whole(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former, later = checkpoint(step=2), replace(checkpoint(step=step), losses=((1, 9.0), (2, 8.0)))
    with monkeypatch.context() as patch:
        calls = injected(patch, name, -1)
        save(former, tmp_path / "probe")
        calls.clear()
        save(later, tmp_path / "probe")
        count = len(calls)
    assert count
    save(former, tmp_path / "former")
    for number in sorted({0, 1, count // 3, count // 2, count - 2, count - 1} & set(range(count))):
        shutil.copytree(tmp_path / "former", folder := tmp_path / str(number))
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
            injected(patch, name, number)
            save(later, folder)
        assert caught.value.reason == CheckpointReason.DISK
        assert "full" in caught.value.sentence
        after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert before.items() <= after.items() or resume(folder).losses == later.losses
        of_model = {file: data for file, data in before.items() if "state" not in file.parts}
        assert of_model.items() <= after.items()
        assert resume(folder).step in (2, step)
        assert not list(folder.rglob(".pending"))


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoint(step=2), tmp_path)
    original = os.replace

    def killed(source: Path, target: Path) -> None:
        original(source, target)
        if ".aside" in target.parts:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
        with pytest.raises(KeyboardInterrupt):
            save(replace(checkpoint(step=2), losses=()), tmp_path)
    assert not (tmp_path / "state" / "step-0000000002").exists()
    assert resume(tmp_path).step == 2


def test_the_card_says_what_was_trained_on_what_and_how_to_prove_it(tmp_path: Path) -> None:
    run = replace(checkpoint(), task="ab" * 32, data="cd" * 32, tokens=1234, sealed_by=f"71:{'ef' * 32}")
    save(replace(run, validation=((2, 4.5),)), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in ("ab" * 32, "cd" * 32, "1,234 tokens", f"height 71, block `{'ef' * 32}`", "4.5000 after step 2"):
        assert said in card
    assert f"tdml-chain task {'ab' * 32} --db chain.db --height 71" in card
    assert "copied with every checkpoint" in card
    assert "raw bytes, 257 ids" in card
    save(checkpoint(), tmp_path / "alone")
    assert "tdml-chain" not in (tmp_path / "alone" / "README.md").read_text()
    assert resume(tmp_path).validation == ((2, 4.5),)


def test_a_finished_run_has_its_curve_as_a_picture(tmp_path: Path) -> None:
    run = checkpoint(step=100)
    save(replace(run, losses=tuple((n, 9.0 / n) for n in range(1, 101)), validation=((50, 1.0), (100, 0.5))), tmp_path)
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (960, 540)
    curve = (tmp_path / "loss.svg").read_text()
    assert curve.count("<polyline") == 2
    assert "validation</text>" in curve
    save(checkpoint(step=3), tmp_path / "half")
    assert not (tmp_path / "half" / "loss.png").exists()


@pytest.mark.parametrize("damage", ["no state", "cut", "flipped", "task"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    if damage != "no state":
        save(checkpoint(), tmp_path)
        folder = tmp_path / "state" / "step-0000000003"
        file = folder / ("task.json" if damage == "task" else "stage-1.safetensors")
        data = bytearray(file.read_bytes())
        if damage == "cut":
            data = data[:-10]
        else:
            data[-5 if damage == "flipped" else 1] ^= 255
        file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path)
    expected = CheckpointReason.MISSING if damage == "no state" else CheckpointReason.DAMAGED
    assert caught.value.reason == expected


def test_text_is_generated_and_the_seed_decides(tmp_path: Path) -> None:
    save(checkpoint(), tmp_path)
    first = generate(tmp_path, "import ", 5, seed=1)
    assert first.startswith("import ")
    assert first == generate(tmp_path, "import ", 5, seed=1)
    assert generate(tmp_path, "", 3, temperature=0) == generate(tmp_path, "", 3, temperature=0, seed=9)
    with pytest.raises(CheckpointError):
        generate(tmp_path / "absent", "x", 1)


def test_a_resumed_local_run_is_the_undisturbed_run() -> None:
    manifest = small_manifest(2)
    data = small_batches(manifest)
    steps: list[LocalStep] = []
    straight = train_locally(manifest, data, 6, steps.append)
    half = train_locally(manifest, data, 3)
    assert train_locally(manifest, data, 6, state=half).root == straight.root
    assert [step.step for step in steps] == list(range(1, 7))
    assert steps[0].loss == pytest.approx(5.77, abs=0.2)


def test_a_run_over_the_rest_is_the_undisturbed_run(tmp_path: Path) -> None:
    settings = OptimizerSettings(warmup_steps=3, schedule="cosine")
    manifest = small_manifest(optimizer=settings, steps=7)
    straight = train_locally(manifest, small_batches(manifest), 7)
    half = train_locally(manifest, small_batches(manifest), 2)
    save(Checkpoint(manifest, (half,), byte_tokenizer(), ((1, 5.5), (2, 5.25))), tmp_path)
    for steps in (3, 2):
        manifest, (state,) = resume(tmp_path).rest()
        assert (state.step, manifest.initial) == (0, (state.root.hex(),))
        assert complete(manifest) == manifest
        batches = small_batches(small_manifest()).continued(manifest)
        half = train_locally(manifest, batches, steps, state=state)
        save(Checkpoint(manifest, (half,), byte_tokenizer()), tmp_path)
    saved = resume(tmp_path)
    assert (saved.step, saved.manifest.start, saved.manifest.steps) == (7, 5, 2)
    assert torch.equal(saved.states[0].weights, straight.weights)
    assert torch.equal(saved.states[0].v, straight.v)
    assert "7 of 7" in (tmp_path / "README.md").read_text()


def test_a_verified_checkpoint_stays_beside_an_unverified_one_of_its_task(tmp_path: Path) -> None:
    task = "0a" * 32
    other, mine = replace(checkpoint(step=9), task="ff" * 32), replace(checkpoint(step=2), task=task)
    newer = replace(checkpoint(step=3), task=task, generation=4, is_verified=False)
    save(other, tmp_path)
    save(newer, tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-0000000003-unverified"]
    with pytest.raises(CheckpointError):
        resume(tmp_path, is_verified=True)
    save(mine, tmp_path)
    save(newer, tmp_path)
    back, fallback = resume(tmp_path), resume(tmp_path, is_verified=True)
    assert (back.step, back.task, back.generation, back.is_verified) == (3, task, 4, False)
    assert (fallback.step, fallback.generation, fallback.is_verified) == (2, -1, True)
    save(replace(checkpoint(step=4), task=task), tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-0000000004"]


def test_saving_the_same_again_writes_no_state(tmp_path: Path) -> None:
    save(checkpoint(), tmp_path)
    file = tmp_path / "state" / "step-0000000003" / "stage-0.safetensors"
    before = file.stat().st_ino
    save(checkpoint(), tmp_path)
    assert file.stat().st_ino == before
    save(replace(checkpoint(), losses=()), tmp_path)
    assert file.stat().st_ino != before
