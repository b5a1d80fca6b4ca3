"""Checkpoints: a folder that `transformers` opens as a model, with `state/` in it to resume from.

`state/step-N/` holds task.json (manifest, step, roots, losses) and one safetensors file per stage (weights
and moments, flat). It is renamed into place as a whole, so the newest one that is there is complete. One
whose audits were still running has a name that ends in `-unverified`, and a verified one stays beside it.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, adapter_tensors
from trainer.card import model_card
from trainer.curve import loss_curve, loss_picture
from trainer.errors import CheckpointError, CheckpointReason, ManifestError, StageError
from trainer.families import family_of
from trainer.files import recover, transaction
from trainer.image_classes import ImageClasses
from trainer.joint import check_tied
from trainer.manifest import TaskManifest, decode_manifest, encode_manifest
from trainer.readers import Reader, open_reader
from trainer.stage import stage_layout
from trainer.state import StageState

__all__ = ["Checkpoint", "CheckpointError", "CheckpointReason", "resume", "save", "whole_tensors"]

_UNVERIFIED = "-unverified"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run after some step: manifest, the state of every stage, tokenizer or classes, and (step, loss) so far.

    `task` and `generation` say where it can go on with the next step; −1 means only as another task.
    `data` is the hash of the text or images, `tokens` how many of its tokens, or of the images, are trained on,
    `validation` (step, loss) on others. `sealed_by` is HEIGHT:HASH of the newest block of the chain when it was saved,
    `base` the folder of the weights under adapters.
    """

    manifest: TaskManifest
    states: tuple[StageState, ...]
    tokenizer: Reader
    losses: tuple[tuple[int, float], ...] = ()
    task: str = ""
    generation: int = -1
    is_verified: bool = True
    data: str = ""
    tokens: int = 0
    validation: tuple[tuple[int, float], ...] = ()
    sealed_by: str = ""
    base: str = ""

    @property
    def step(self) -> int:
        """Steps of the whole training that are done."""
        return self.manifest.start + self.states[0].step

    def rest(self) -> tuple[TaskManifest, tuple[StageState, ...]]:
        """Return the manifest of a run over the steps that are left, and its initial states."""
        states = tuple(StageState(0, state.weights, state.m, state.v) for state in self.states)
        left = self.manifest.total_steps - self.step
        manifest = msgspec.structs.replace(self.manifest, start=self.step, steps=left)
        return starting_from(manifest, states), states


class _Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    step: int
    roots: tuple[str, ...]
    losses: tuple[tuple[int, float], ...]
    task: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
    generation: int
    data: str = ""
    tokens: int = 0
    validation: tuple[tuple[int, float], ...] = ()
    base: str = ""


def starting_from(manifest: TaskManifest, states: Sequence[StageState]) -> TaskManifest:
    """Return the manifest of a run whose initial states are `states`."""
    return msgspec.structs.replace(manifest, initial=tuple(state.root.hex() for state in states))


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` into `folder`; raise `CheckpointError`, leaving the previous one whole."""
    if len({state.step for state in checkpoint.states}) != 1:
        raise ValueError("the stages of a checkpoint must be at one step")
    try:
        check_tied(checkpoint.manifest, checkpoint.states)
    except StageError as error:
        raise CheckpointError(CheckpointReason.APART, error.sentence, "Go on from an earlier state.") from None
    state_folder = folder / "state"
    step = f"step-{checkpoint.step:010d}{'' if checkpoint.is_verified else _UNVERIFIED}"
    if not _is_saved(state_folder / step, checkpoint):
        with transaction(state_folder) as change:
            for index, state in enumerate(checkpoint.states):
                parts = {"weights": state.weights, "m": state.m, "v": state.v}
                change.write_tensors(f"{step}/stage-{index}.safetensors", parts, {"root": state.root.hex()})
            change.write(f"{step}/task.json", _task_bytes(checkpoint))
    with transaction(folder) as change:
        name, tensors = _weights(checkpoint)
        change.write_tensors(name, tensors, {"format": "pt"})
        for name, data in _texts(checkpoint).items():
            change.write(name, data)
    for old in state_folder.glob("step-*"):
        if old.name != step and (checkpoint.is_verified or not _is_fallback(old, checkpoint.task)):
            shutil.rmtree(old, ignore_errors=True)


def refuse_occupied(folder: Path) -> None:
    """Raise `CheckpointError` if `folder` holds a run, which a new one would overwrite."""
    if any((folder / "state").glob("step-*/task.json")):
        raise CheckpointError(
            CheckpointReason.OCCUPIED,
            f"{folder} holds the model of another run.",
            "Continue it with --resume, or choose another folder.",
        )


def resume(folder: Path, *, is_verified: bool = False) -> Checkpoint:
    """Return the newest checkpoint in `folder`, checked against its roots; raise `CheckpointError`.

    With `is_verified` the newest of those whose audits had all ended.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be written can still be read
        recover(folder / "state")
    found = sorted((folder / "state").glob("step-*/task.json"))
    if is_verified:
        found = [file for file in found if not file.parent.name.endswith(_UNVERIFIED)]
    if not found:
        raise CheckpointError(
            CheckpointReason.MISSING,
            f"There is no checkpoint in {folder}.",
            "Give the --out folder of a former run.",
        )
    try:
        task = msgspec.json.decode(found[-1].read_bytes(), type=_Task)
        manifest = decode_manifest(bytes(task.manifest))
        states = tuple(_stage_state(found[-1].parent, manifest, task, index) for index in range(manifest.stages))
    except (OSError, msgspec.DecodeError, ManifestError, SafetensorError, KeyError, IndexError) as error:
        raise _damaged(folder, str(error)) from None
    has_verdicts = not found[-1].parent.name.endswith(_UNVERIFIED)
    tokenizer = open_reader(folder, manifest)
    return Checkpoint(
        manifest=manifest,
        states=states,
        tokenizer=tokenizer,
        losses=task.losses,
        task=task.task,
        generation=task.generation,
        is_verified=has_verdicts,
        data=task.data,
        tokens=task.tokens,
        validation=task.validation,
        base=task.base,
    )


def whole_tensors(manifest: TaskManifest, states: Sequence[StageState]) -> dict[str, Tensor]:
    """Return the state dict of what the whole model trains, its tensors being views of the stages' weights."""
    tensors: dict[str, Tensor] = {}
    for index, state in enumerate(states):
        layout = stage_layout(manifest, index)
        for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
            tensors[tensor.name] = state.weights[start:stop].view(tensor.shape)
    return tensors


def _weights(checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """Return the file of the trained tensors and what is in it."""
    tensors = whole_tensors(checkpoint.manifest, checkpoint.states)
    if checkpoint.manifest.lora is None:
        return "model.safetensors", _stored(checkpoint.manifest, tensors)
    return ADAPTER_WEIGHTS, adapter_tensors(tensors)


def _stored(manifest: TaskManifest, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which counts, of which a cell leaves all, are the integers that torch has."""
    counts = {tensor.name for tensor in manifest.whole_layout.statistics if tensor.kept == 1.0}
    return {name: tensor.long() if name in counts else tensor for name, tensor in tensors.items()}


def _is_saved(folder: Path, checkpoint: Checkpoint) -> bool:
    try:
        return (folder / "task.json").read_bytes() == _task_bytes(checkpoint)
    except OSError:
        return False


def _is_fallback(folder: Path, task: str) -> bool:
    """Whether a checkpoint is a verified one of `task`."""
    try:
        saved = msgspec.json.decode((folder / "task.json").read_bytes(), type=_Task)
    except (OSError, msgspec.DecodeError):
        return False
    return saved.task == task and not folder.name.endswith(_UNVERIFIED)


def _stage_state(folder: Path, manifest: TaskManifest, task: _Task, index: int) -> StageState:
    # cloned: the tensors are mapped to the file, which somebody may change while the run goes on
    parts = {name: part.clone() for name, part in load_file(folder / f"stage-{index}.safetensors").items()}
    state = StageState(task.step, parts["weights"], parts["m"], parts["v"])
    total = stage_layout(manifest, index).total
    is_right = all(part.dtype == torch.float32 and part.shape == (total,) for part in parts.values())
    if not is_right or state.root.hex() != task.roots[index]:
        raise _damaged(folder, f"stage {index} is not the one that was saved")
    return state


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        CheckpointReason.DAMAGED,
        f"The checkpoint in {folder} cannot be read: {why[:200]}.",
        "Resume from another copy, or start anew in an empty folder.",
    )


def _task_bytes(checkpoint: Checkpoint) -> bytes:
    manifest = msgspec.Raw(encode_manifest(checkpoint.manifest))
    roots = tuple(state.root.hex() for state in checkpoint.states)
    return msgspec.json.encode(
        _Task(
            manifest=manifest,
            step=checkpoint.states[0].step,
            roots=roots,
            losses=checkpoint.losses,
            task=checkpoint.task,
            generation=checkpoint.generation,
            data=checkpoint.data,
            tokens=checkpoint.tokens,
            validation=checkpoint.validation,
            base=checkpoint.base,
        )
    )


def _texts(checkpoint: Checkpoint) -> dict[str, bytes]:
    manifest, tokenizer = checkpoint.manifest, checkpoint.tokenizer
    family = family_of(manifest.family)
    title = f"{manifest.family}, {manifest.parameters:,} parameters: loss by step"
    return {
        **_configs(checkpoint),
        **tokenizer.files(family.context(manifest.config)),
        "loss.svg": loss_curve(checkpoint.losses, title, checkpoint.validation).encode(),
        **_picture(checkpoint, title),
        "README.md": model_card(checkpoint).encode(),
    }


def _configs(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return what says how the weights are to be opened, by the name of the file."""
    manifest, tokenizer = checkpoint.manifest, checkpoint.tokenizer
    if manifest.lora is not None:
        return {ADAPTER_CONFIG: adapter_config(manifest, checkpoint.base)}
    config = family_of(manifest.family).whole_config(manifest.config)
    if isinstance(tokenizer, ImageClasses):
        return {"config.json": json.dumps({**config, **tokenizer.model_settings}, indent=2).encode()}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    return {
        "config.json": json.dumps({**config, **special}, indent=2).encode(),
        "generation_config.json": json.dumps(special, indent=2).encode(),
    }


def _picture(checkpoint: Checkpoint, title: str) -> dict[str, bytes]:
    """Return the curve as PNG by name, at the end of a run only: drawing it takes most of a second."""
    if checkpoint.step < checkpoint.manifest.total_steps:
        return {}
    picture = loss_picture(checkpoint.losses, title, checkpoint.validation)
    return {} if picture is None else {"loss.png": picture}
