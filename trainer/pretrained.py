"""Models to train on from: a Hugging Face `config.json`, alone or in a folder with weights and tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ModelError, ModelReason, StageError
from trainer.families import family_of
from trainer.families.base import Config
from trainer.layout import StageSpec
from trainer.manifest import TaskManifest
from trainer.state import StageState, state_of_weights

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.gguf", "*.msgpack")
_DERIVED = ".rotary_emb.inv_freq"  # old checkpoints hold it, though it follows from the config


@dataclass(frozen=True)
class Pretrained:
    """Family, settings and, where there are any, the files with weights and the folder of the tokenizer."""

    family: str
    config: Config
    weights: tuple[Path, ...] = ()
    tokenizer: Path | None = None


def read_pretrained(path: Path) -> Pretrained:
    """Return what a model folder or a config file holds; raise `ModelError` or `ManifestError`."""
    file = path / "config.json" if path.is_dir() else path
    try:
        found: Any = json.loads(file.read_text())
        name = found["model_type"]
    except OSError as error:
        raise _unreadable(
            f"{file} cannot be read: {error.strerror}.", "Give a model folder or a config file."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unreadable(f"{file} is not a model config.", "It must be JSON with a model_type.") from None
    config = family_of(str(name)).read(found)
    if not path.is_dir():
        return Pretrained(str(name), config)
    weights = tuple(sorted(path.glob("*.safetensors")))
    if not weights and (other := [file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern)]):
        raise ModelError(
            ModelReason.NOT_SAFETENSORS,
            f"{path} holds weights in {sorted(other)[0]}, which only safetensors files may do.",
            "Save the model as safetensors, or give its config.json to train from scratch.",
        )
    tokenizer = path if (path / "tokenizer.json").exists() else None
    if weights and tokenizer is None:
        raise ModelError(
            ModelReason.NO_TOKENIZER,
            f"{path} holds weights but no tokenizer.json to read text as they were trained.",
            "Add the model's tokenizer.json, or give its config.json to train from scratch.",
        )
    return Pretrained(str(name), config, weights, tokenizer)


def starting_states(model: Pretrained, manifest: TaskManifest) -> tuple[StageState, ...]:
    """Return every stage's state before the first step, weights cast to fp32; raise `ModelError`."""
    tensors = _tensors(model.weights)
    layers = manifest.layers
    wanted = {
        tensor.name for tensor in family_of(manifest.family).layout(manifest.config, StageSpec(0, 1, 0, layers)).tensors
    }
    strangers = sorted(name for name in set(tensors) - wanted if not name.endswith(_DERIVED))
    if strangers:
        raise _misfit(f"The weights have a tensor {strangers[0][:100]} that the model of config.json has not.")
    try:
        states = tuple(state_of_weights(manifest, index, tensors) for index in range(manifest.stages))
    except StageError as error:
        raise _misfit(error.sentence) from None
    if not all(bool(torch.isfinite(state.weights).all()) for state in states):
        raise _misfit("The weights hold values that are not finite.")
    return states


def _tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise _unreadable(f"{file} cannot be read: {str(error)[:200]}.", "Fetch the file again.") from None
    return tensors


def _unreadable(sentence: str, hint: str) -> ModelError:
    return ModelError(ModelReason.UNREADABLE, sentence, hint)


def _misfit(sentence: str) -> ModelError:
    return ModelError(
        ModelReason.WRONG_TENSORS, sentence, "Give a folder whose config.json and safetensors belong together."
    )
