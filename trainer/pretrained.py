"""Models to train on from: a Hugging Face `config.json`, alone or in a folder with weights and tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.adapter_files import ADAPTER_CONFIG
from trainer.base_weights import StageBase, whole_base
from trainer.errors import ModelError, ModelReason, StageError
from trainer.families import family_of
from trainer.families.base import Config
from trainer.layout import StageSpec
from trainer.manifest import TaskManifest
from trainer.presets import preset_of
from trainer.state import StageState, state_of_weights

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.gguf", "*.msgpack")
_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


@dataclass(frozen=True)
class Pretrained:
    """Family, settings and, where there are any, the files with weights and the folder of the tokenizer.

    `image_size` is what a built-in model's images usually have, 0 where nothing says it.
    """

    family: str
    config: Config
    weights: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    image_size: int = 0


def read_pretrained(path: Path) -> Pretrained:
    """Return what a model folder or a config file holds; raise `ModelError` or `ManifestError`."""
    file = path / "config.json" if path.is_dir() else path
    if (path / ADAPTER_CONFIG).exists() and not file.exists():
        raise _unreadable(
            f"{path} holds adapters, not a model.", "Give the model that they belong to, or go on with --resume."
        )
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
    if weights and tokenizer is None and family_of(str(name)).kind == "text":
        raise ModelError(
            ModelReason.NO_TOKENIZER,
            f"{path} holds weights but no tokenizer.json to read text as they were trained.",
            "Add the model's tokenizer.json, or give its config.json to train from scratch.",
        )
    return Pretrained(str(name), config, weights, tokenizer)


def model_of(name: str) -> Pretrained:
    """Return the model that a folder, a config file or a built-in name stands for; raise `TrainerError`."""
    path = Path(name)
    if path.exists():
        return read_pretrained(path)
    preset = preset_of(name)
    return Pretrained(preset.family, dict(preset.config), image_size=preset.image_size)


def starting_states(model: Pretrained, manifest: TaskManifest) -> tuple[StageState, ...]:
    """Return every stage's state before the first step, weights cast to fp32; raise `ModelError`."""
    tensors = _model_tensors(model, manifest.config)
    try:
        states = tuple(state_of_weights(manifest, index, tensors) for index in range(manifest.stages))
    except StageError as error:
        raise _misfit(error.sentence) from None
    if not all(bool(torch.isfinite(state.weights).all()) for state in states):
        raise _misfit("The weights hold values that are not finite.")
    return states


def frozen_base(model: Pretrained) -> StageBase:
    """Return the weights of a model that adapters are to be trained on, cast to fp32; raise `TrainerError`."""
    if not model.weights:
        raise ModelError(
            ModelReason.NO_WEIGHTS,
            "Adapters are trained on the weights of a model, and this one has none.",
            "Give a folder with config.json, safetensors and tokenizer.json with --model.",
        )
    config = family_of(model.family).complete(model.config)
    try:
        base = whole_base(model.family, config, _model_tensors(model, config))
    except StageError as error:
        raise _misfit(error.sentence) from None
    if not bool(torch.isfinite(base.weights).all()):
        raise _misfit("The weights hold values that are not finite.")
    return base


def _model_tensors(model: Pretrained, config: Config) -> dict[str, Tensor]:
    """Return a model's state dict for a complete config; raise `ModelError` for tensors that are not of it."""
    family = family_of(model.family)
    named = {family.stored_name(config, name): tensor for name, tensor in _tensors(model.weights).items()}
    tensors = {name: tensor for name, tensor in named.items() if name}
    spec = StageSpec(0, 1, 0, family.layers(config))
    strangers = sorted(set(tensors) - {tensor.name for tensor in family.layout(config, spec).tensors})
    if strangers:
        raise _misfit(f"The weights have a tensor {strangers[0][:100]} that the model of config.json has not.")
    return tensors


def _tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise _unreadable(f"{file} cannot be read: {str(error)[:200]}.", "Fetch the file again.") from None
    for name, tensor in tensors.items():
        is_count = tensor.dtype == torch.int64 and not tensor.dim()  # of the batches that a norm has seen
        if tensor.dtype not in _DTYPES and not is_count:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise _misfit(f"The weights' tensor {name[:100]} holds {kind}, not plain floating-point numbers.")
    return tensors


def _unreadable(sentence: str, hint: str) -> ModelError:
    return ModelError(ModelReason.UNREADABLE, sentence, hint)


def _misfit(sentence: str) -> ModelError:
    return ModelError(
        ModelReason.WRONG_TENSORS, sentence, "Give a folder whose config.json and safetensors belong together."
    )
