"""Built-in models: names for configs of the families that ship with the peer."""

from dataclasses import dataclass

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config


@dataclass(frozen=True)
class Preset:
    """A named family and config."""

    family: str
    config: Config


def _llama(vocabulary: int, hidden: int, layers: int, inner: int, heads: int) -> Preset:
    return Preset(
        "llama",
        {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": inner,
            "num_attention_heads": heads,
        },
    )


PRESETS: dict[str, Preset] = {
    "llama-tiny": _llama(2048, 128, 4, 352, 4),
    "llama-8m": _llama(4096, 256, 8, 688, 4),
    "llama-25m": _llama(8192, 384, 10, 1088, 6),
    "llama-100m": _llama(16384, 768, 12, 1792, 12),
}


def preset_of(name: str) -> Preset:
    """Return the preset called `name`; raise `ManifestError` for an unknown one."""
    preset = PRESETS.get(name)
    if preset is None:
        raise ManifestError(
            ManifestReason.UNKNOWN_PRESET,
            f"The model {name[:64]!r} is not known.",
            f"Built-in models: {', '.join(PRESETS)}.",
        )
    return preset
