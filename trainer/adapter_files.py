"""Adapters as files in the format of peft, and a model with adapters merged into its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.families import family_of
from trainer.families.decoder import Decoder
from trainer.manifest import TaskManifest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_config(manifest: TaskManifest, base: str) -> bytes:
    """Return the adapter_config.json of adapters on the model in folder `base`."""
    lora = manifest.lora
    assert lora is not None  # asked for adapters only
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "fan_in_fan_out": cast(Decoder, family_of(manifest.family)).is_transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2).encode()


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return adapters under the names that they have in a file of peft."""
    return {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def base_of(folder: Path) -> Path:
    """Return the folder of the model that the adapters in `folder` belong to; `folder` itself if it has none."""
    try:
        return Path(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder


def merge(model: Any, folder: Path) -> None:
    """Add the adapters in `folder` to the weights of a `transformers` model.

    Files that do not fit raise `OSError`, `KeyError`, `AttributeError`, `ValueError`, `RuntimeError` or
    `SafetensorError`.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith(_A):
                module = model.get_submodule(name.removeprefix(_PREFIX).removesuffix(_A))
                share = (tensors[name.removesuffix(_A) + _B] @ down) * (config["lora_alpha"] / config["r"])
                module.weight += share.T if config["fan_in_fan_out"] else share
