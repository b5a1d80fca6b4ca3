"""The `llama` and `qwen2` families: RMSNorm, rotary positions, gated units, grouped-query attention."""

from collections.abc import Mapping

from trainer.errors import ManifestReason
from trainer.families.base import Config
from trainer.families.decoder import Decoder, Names, Settings, ones, zeros
from trainer.families.settings import ACTIVATIONS, check_rope, read_rope, refuse, rope_parameters
from trainer.layout import TensorSpec

_SIZES = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 20,
}
_DEFAULTS: Config = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_RATES = {"rms_norm_eps": (0.0, 0.1), "initializer_range": (0.0, 1.0)}
_NAMES = Names("model", "model.embed_tokens", "model.layers", "model.norm")


class Llama(Decoder):
    """Llama decoders, with or without biases."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    names = _NAMES
    usual_targets = ("q_proj", "v_proj")
    derived = (".rotary_emb.inv_freq",)
    settings = Settings(
        defaults={**_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        sizes=_SIZES,
        rates=_RATES,
        chances=("attention_dropout",),
        switches=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        choices={"hidden_act": ACTIVATIONS},
        neutral={"pretraining_tp": 1},
    )

    def fill(self, config: Config) -> Config:
        """Return a config with key-value heads and their width; raise `ManifestError`."""
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            if hidden % heads:
                raise refuse(f"The hidden size {hidden} is not a multiple of the {heads} attention heads.")
            config = {"num_key_value_heads": heads, "head_dim": hidden // heads, **config}
        unknown = sorted(key for key in config if key.startswith("rope_") and key not in check_rope(config))
        checked = {**self.settings.check(config), **check_rope(config)}
        if unknown and config[unknown[0]] != "default":
            raise refuse(f"The model setting {unknown[0][:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        if int(checked["num_attention_heads"]) % int(checked["num_key_value_heads"]):
            raise refuse("The number of attention heads is not a multiple of the key-value heads.")
        if int(checked["head_dim"]) % 2:
            raise refuse("The model's head_dim must be even for rotary positions.")
        return checked

    def read_other(self, key: str, value: object, found: Mapping[str, object]) -> Config:
        """Return rotary settings; raise `ManifestError` for an unknown setting."""
        if key in ("rope_parameters", "rope_scaling"):
            return {} if value is None else read_rope(value)
        return super().read_other(key, value, found)

    def attention_width(self, config: Config) -> int:
        """Return the elements of all heads' queries."""
        return int(config["num_attention_heads"]) * int(config["head_dim"])

    def biased(self, config: Config) -> frozenset[str]:
        """Return the projections that have a bias."""
        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        inner = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        return frozenset((*(attention if config["attention_bias"] else ()), *(inner if config["mlp_bias"] else ())))

    def layer(self, config: Config, index: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one decoder layer."""
        hidden, inner, head = self.hidden(config), int(config["intermediate_size"]), int(config["head_dim"])
        queries = self.attention_width(config)
        keys = int(config["num_key_value_heads"]) * head
        deviation, prefix = float(config["initializer_range"]), f"{self.names.layer}.{index}."
        matrices = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        biased = self.biased(config)
        return (
            *(TensorSpec(f"{prefix}{name}.weight", shape, True, deviation) for name, shape in matrices.items()),
            *(zeros(f"{prefix}{name}.bias", shape[0]) for name, shape in matrices.items() if name in biased),
            *(ones(f"{prefix}{name}.weight", hidden) for name in ("input_layernorm", "post_attention_layernorm")),
        )

    def whole_config(self, config: Config) -> dict[str, object]:
        """Return the content of `config.json`, read by the family's class in `transformers`."""
        plain = {key: value for key, value in config.items() if not key.startswith("rope_")}
        return {**super().whole_config(plain), "rope_parameters": rope_parameters(config)}


class Qwen2(Llama):
    """Qwen2 decoders: a Llama with biases on queries, keys and values."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    settings = Settings(
        defaults={**_DEFAULTS, "max_position_embeddings": 32768},
        sizes=_SIZES,
        rates=_RATES,
        chances=("attention_dropout",),
        switches=("tie_word_embeddings",),
        choices={"hidden_act": ACTIVATIONS},
        neutral={"use_sliding_window": False},
    )

    def biased(self, config: Config) -> frozenset[str]:
        """Return the projections that have a bias."""
        return frozenset(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))

    def read_other(self, key: str, value: object, found: Mapping[str, object]) -> Config:
        """Return rotary settings; raise `ManifestError` for an unknown setting or layers of another kind."""
        if key in ("sliding_window", "max_window_layers"):
            return {}  # of no effect unless use_sliding_window is set
        if key == "layer_types":
            if isinstance(value, list) and any(kind != "full_attention" for kind in value):
                raise refuse("The model's layer_types must all be 'full_attention'.", ManifestReason.UNKNOWN_SETTING)
            return {}
        return super().read_other(key, value, found)


LLAMA = Llama()
QWEN2 = Qwen2()
