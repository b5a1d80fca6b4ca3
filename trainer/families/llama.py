"""The `llama` family: config checks, costs and layout; the torch side is in `llama_modules`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config, Costs, StageModule
from trainer.layout import Layout, StageSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

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
_RATES = {"rms_norm_eps": (0.0, 0.1), "rope_theta": (1.0, 1e9), "initializer_range": (0.0, 1.0)}
_DEFAULTS: Config = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# what a config.json may say besides: of no effect on training, or only at this value
_IDLE = frozenset(
    (
        "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )
)  # fmt: skip
_NEUTRAL: dict[str, object] = {"attention_dropout": 0.0, "pretraining_tp": 1, "rope_scaling": None}
_FIXED: Config = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# what elementwise work costs, in multiply-adds of a matrix product: fitted to measured stages of four shapes
_SOFTMAX_COST = 48  # per vocabulary entry: softmax, loss and their gradients
_ELEMENT_COST = 400  # per hidden element of a layer: norms, rotary embedding, activation, residuals
_ATTENTION_COST = 7  # per position and query element


def _refuse(sentence: str, reason: ManifestReason = ManifestReason.BAD_CONFIG, hint: str = "") -> ManifestError:
    return ManifestError(reason, sentence, hint)


def _checked_size(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _SIZES[key]:
        raise _refuse(f"The model's {key} must be a whole number from 1 to {_SIZES[key]}.")
    return value


def _checked_rate(key: str, value: object) -> float:
    low, high = _RATES[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise _refuse(f"The model's {key} must be a number above {low:g} and at most {high:g}.")
    return float(value)


def _rope_theta(parameters: object) -> float:
    """Return the base of the rotary positions; raise `ManifestError` unless they are the plain ones."""
    if not isinstance(parameters, Mapping) or not set(parameters) <= {"rope_type", "rope_theta"}:
        raise _refuse("The model's rope_parameters are not known.", ManifestReason.UNKNOWN_SETTING)
    if parameters.get("rope_type", "default") != "default":
        raise _refuse("The model's rope_type must be 'default'.", ManifestReason.UNKNOWN_SETTING)
    return _checked_rate("rope_theta", parameters.get("rope_theta", _DEFAULTS["rope_theta"]))


class Llama:
    """Llama decoders: RMSNorm, rotary positions, SwiGLU, grouped-query attention, untied head."""

    name = "llama"

    def complete(self, config: Config) -> Config:
        """Return `config` checked and complete; raise `ManifestError`."""
        full: Config = {**_DEFAULTS, **config}
        heads = _checked_size("num_attention_heads", full.get("num_attention_heads"))
        hidden = _checked_size("hidden_size", full.get("hidden_size"))
        full.setdefault("num_key_value_heads", heads)
        if hidden % heads:
            raise _refuse(f"The hidden size {hidden} is not a multiple of the {heads} attention heads.")
        full.setdefault("head_dim", hidden // heads)
        unknown = sorted(set(full) - set(_SIZES) - set(_DEFAULTS))
        if unknown:
            raise _refuse(f"The model setting {unknown[0][:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        for key in _SIZES:
            full[key] = _checked_size(key, full.get(key))
        for key in _RATES:
            full[key] = _checked_rate(key, full[key])
        self._check_shape(full)
        return full

    def read(self, found: Mapping[str, object]) -> Config:
        """Return the settings in a `config.json`; raise `ManifestError` for one that would change the model."""
        config: Config = {}
        for key, value in found.items():
            if key in _SIZES or key in _DEFAULTS:
                if isinstance(value, (int, float, str)):
                    config[key] = value
                elif value is not None:
                    raise _refuse(f"The model's {key} cannot be {str(value)[:64]!r}.")
            elif key == "rope_parameters":
                config["rope_theta"] = _rope_theta(value)
            elif key in _NEUTRAL and value != _NEUTRAL[key]:
                raise _refuse(f"The model's {key} must be {_NEUTRAL[key]!r}.", ManifestReason.UNKNOWN_SETTING)
            elif key not in _NEUTRAL and key not in _IDLE and not key.startswith("_"):
                raise _refuse(f"The model setting {key[:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        return config

    def _check_shape(self, config: Config) -> None:
        if config["tie_word_embeddings"] is not False:
            raise _refuse(
                "Tied embeddings are not supported: the embedding lives in the first stage and the head in "
                "the last, on different peers.",
                ManifestReason.TIED_EMBEDDINGS,
                "Set tie_word_embeddings to false.",
            )
        for key, value in _FIXED.items():
            if config[key] != value or type(config[key]) is not type(value):
                raise _refuse(f"The model's {key} must be {value!r}.")
        if int(config["num_attention_heads"]) % int(config["num_key_value_heads"]):
            raise _refuse("The number of attention heads is not a multiple of the key-value heads.")
        if int(config["head_dim"]) % 2:
            raise _refuse("The model's head_dim must be even for rotary positions.")

    def layers(self, config: Config) -> int:
        """Return the number of decoder layers."""
        return int(config["num_hidden_layers"])

    def hidden(self, config: Config) -> int:
        """Return the width of the hidden activations."""
        return int(config["hidden_size"])

    def vocabulary(self, config: Config) -> int:
        """Return the size of the vocabulary."""
        return int(config["vocab_size"])

    def context(self, config: Config) -> int:
        """Return the longest sequence."""
        return int(config["max_position_embeddings"])

    def costs(self, config: Config, sequence: int) -> Costs:
        """Return multiply-adds per token, elementwise work counted at its measured equivalent."""
        hidden, width = self.hidden(config), int(config["num_attention_heads"]) * int(config["head_dim"])
        matmul = sum(tensor.size for tensor in self._layer(config, 0) if len(tensor.shape) == 2)
        head = self.vocabulary(config) * (hidden + _SOFTMAX_COST)
        layer = matmul + _ATTENTION_COST * sequence * width + _ELEMENT_COST * hidden
        return Costs(layer, 2 * hidden, head)

    def layout(self, config: Config, spec: StageSpec) -> Layout:
        """Return the parameters of one stage under their names in `LlamaForCausalLM`."""
        hidden, deviation = self.hidden(config), float(config["initializer_range"])
        table = (self.vocabulary(config), hidden)
        tensors: list[TensorSpec] = []
        if spec.is_first:
            tensors.append(TensorSpec("model.embed_tokens.weight", table, True, deviation))
        for index in range(spec.first, spec.last):
            tensors.extend(self._layer(config, index))
        if spec.is_last:
            tensors.append(TensorSpec("model.norm.weight", (hidden,), False, 0.0))
            tensors.append(TensorSpec("lm_head.weight", table, True, deviation))
        return Layout(tuple(tensors))

    def _layer(self, config: Config, index: int) -> tuple[TensorSpec, ...]:
        hidden, inner, head = self.hidden(config), int(config["intermediate_size"]), int(config["head_dim"])
        queries = int(config["num_attention_heads"]) * head
        keys = int(config["num_key_value_heads"]) * head
        deviation, prefix = float(config["initializer_range"]), f"model.layers.{index}."
        matrices = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        return (
            *(TensorSpec(f"{prefix}{name}.weight", shape, True, deviation) for name, shape in matrices.items()),
            *(TensorSpec(f"{prefix}{name}.weight", (hidden,), False, 0.0) for name in norms),
        )

    def build(self, config: Config, spec: StageSpec, flat: Tensor) -> StageModule:
        """Return the stage's module on views into `flat`."""
        from trainer.families.llama_modules import build

        return build(self.whole_config(config), spec, self.layout(config, spec), flat)

    def whole_config(self, config: Config) -> dict[str, object]:
        """Return the content of `config.json`, read by `transformers.LlamaConfig`."""
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        plain = {key: value for key, value in config.items() if key != "rope_theta"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "attention_dropout": 0.0,
            "use_cache": True,
            "rope_parameters": rope,
            **plain,
        }


LLAMA = Llama()
