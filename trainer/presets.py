"""Built-in models: names for configs of the families that ship with the peer."""

from dataclasses import dataclass

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config


@dataclass(frozen=True)
class Preset:
    """A named family and config, and for images the usual pixels of a side."""

    family: str
    config: Config
    image_size: int = 0


def _gpt2(vocabulary: int, hidden: int, layers: int, heads: int) -> Preset:
    shape: Config = {"vocab_size": vocabulary, "n_embd": hidden, "n_layer": layers, "n_head": heads}
    return Preset("gpt2", {**shape, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})


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


def _resnet(embedding: int, widths: str, depths: str, size: int) -> Preset:
    shape: Config = {"embedding_size": embedding, "hidden_sizes": widths, "depths": depths, "layer_type": "basic"}
    return Preset("resnet", shape, size)


PRESETS: dict[str, Preset] = {
    "llama-tiny": _llama(2048, 128, 4, 352, 4),
    "llama-8m": _llama(4096, 256, 8, 688, 4),
    "llama-25m": _llama(8192, 384, 10, 1088, 6),
    "llama-100m": _llama(16384, 768, 12, 1792, 12),
    "gpt2-tiny": _gpt2(2048, 128, 4, 4),
    "resnet-tiny": _resnet(16, "16,32", "2,2", 32),
    "resnet-18": _resnet(64, "64,128,256,512", "2,2,2,2", 224),
    "qwen2-tiny": Preset("qwen2", {**_llama(2048, 128, 4, 352, 4).config, "num_key_value_heads": 2}),
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
