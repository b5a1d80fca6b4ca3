"""Settings of a model config: the bounds of each, and refusals by name. Known without torch."""

from collections.abc import Mapping, Sequence
from math import isfinite

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary positions that depend on the position alone, and the settings of each."""
# what a config.json may say that has no effect on training
_IDLE = frozenset(
    (
        "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params",
    )
)  # fmt: skip


def refuse(sentence: str, reason: ManifestReason = ManifestReason.BAD_CONFIG, hint: str = "") -> ManifestError:
    """Return the refusal of a config."""
    return ManifestError(reason, sentence, hint)


def is_idle(key: str) -> bool:
    """Whether a setting of a `config.json` has no effect on training."""
    return key in _IDLE or key.startswith("_")


def size(key: str, value: object, bound: int) -> int:
    """Return a whole number from 1 to `bound`; raise `ManifestError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= bound:
        raise refuse(f"The model's {key} must be a whole number from 1 to {bound}.")
    return value


def rate(key: str, value: object, low: float, high: float) -> float:
    """Return a number above `low` and at most `high`; raise `ManifestError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise refuse(f"The model's {key} must be a number above {low:g} and at most {high:g}.")
    return float(value)


def chance(key: str, value: object) -> float:
    """Return a number from 0 to below 1; raise `ManifestError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise refuse(f"The model's {key} must be a number from 0 to below 1.")
    return float(value)


def switch(key: str, value: object) -> bool:
    """Return true or false; raise `ManifestError`."""
    if not isinstance(value, bool):
        raise refuse(f"The model's {key} must be true or false.")
    return value


def choice(key: str, value: object, known: Sequence[str]) -> str:
    """Return one of `known`; raise `ManifestError`."""
    if not isinstance(value, str) or value not in known:
        raise refuse(f"The model's {key} must be one of {', '.join(known)}.")
    return value


def plain(key: str, value: object) -> int | float | bool | str:
    """Return a value that a config can hold; raise `ManifestError`."""
    if not isinstance(value, (int, float, str)):
        raise refuse(f"The model's {key} cannot be {str(value)[:64]!r}.")
    return value


def read_rope(found: object) -> Config:
    """Return rotary settings of a `config.json` under flat names; raise `ManifestError` for unknown ones."""
    if not isinstance(found, Mapping):
        raise refuse("The model's rope_parameters are not known.", ManifestReason.UNKNOWN_SETTING)
    # configs before transformers 5 say `type` and hold rope_theta beside
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_SETTINGS:
        known = ", ".join(ROPE_SETTINGS)
        raise refuse(f"The model's rope_type must be one of {known}.", ManifestReason.UNKNOWN_SETTING)
    config: Config = {"rope_type": str(kind)}
    for key, value in found.items():
        if key == "rope_theta":
            config["rope_theta"] = plain(key, value)
        elif key in ROPE_SETTINGS[str(kind)]:
            config[f"rope_{key}"] = plain(key, value)
        elif key not in ("rope_type", "type"):
            raise refuse(f"The rotary setting {str(key)[:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
    return config


def check_rope(config: Config) -> Config:
    """Return the checked rotary settings among `config`; raise `ManifestError`."""
    kind = choice("rope_type", config.get("rope_type", "default"), tuple(ROPE_SETTINGS))
    checked: Config = {"rope_theta": rate("rope_theta", config.get("rope_theta", 10000.0), 1.0, 1e12)}
    if kind == "default":
        return checked
    checked["rope_type"] = kind
    for key in ROPE_SETTINGS[kind]:
        name, value = f"rope_{key}", config.get(f"rope_{key}")
        is_length = key == "original_max_position_embeddings"
        checked[name] = size(name, value, 1 << 20) if is_length else rate(name, value, 0.0, 1e6)
    if kind == "llama3" and not float(checked["rope_low_freq_factor"]) < float(checked["rope_high_freq_factor"]):
        raise refuse("The model's low_freq_factor must be below its high_freq_factor.")
    return checked


def rope_parameters(config: Config) -> dict[str, object]:
    """Return the `rope_parameters` of `config.json` for checked settings."""
    kind = str(config.get("rope_type", "default"))
    extra = {key: config[f"rope_{key}"] for key in ROPE_SETTINGS[kind]}
    return {"rope_type": kind, "rope_theta": config["rope_theta"], **extra}


def is_finite(config: Config) -> bool:
    """Whether every number of a config is finite."""
    return all(isfinite(value) for value in config.values() if isinstance(value, float))
