"""The `gpt2` family: learned positions, LayerNorm, biases everywhere, a head that is usually tied."""

from math import sqrt

from trainer.families.base import Config
from trainer.families.decoder import Decoder, Names, Settings, ones, zeros
from trainer.families.settings import ACTIVATIONS, refuse
from trainer.layout import TensorSpec


class Gpt2(Decoder):
    """GPT-2 decoders; matrices are stored (in, out), as `transformers` does."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    names = Names("transformer", "transformer.wte", "transformer.h", "transformer.ln_f", positions="transformer.wpe")
    usual_targets = ("c_attn",)
    is_transposed = True
    derived = (".attn.bias", ".attn.masked_bias")
    settings = Settings(
        defaults={
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
        sizes={
            "vocab_size": 1 << 20,
            "n_positions": 1 << 20,
            "n_embd": 1 << 16,
            "n_layer": 1024,
            "n_head": 1024,
            "n_inner": 1 << 18,
        },
        rates={"layer_norm_epsilon": (0.0, 0.1), "initializer_range": (0.0, 1.0)},
        chances=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        switches=("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        choices={"activation_function": ACTIVATIONS},
        neutral={"reorder_and_upcast_attn": False, "add_cross_attention": False},
    )

    def fill(self, config: Config) -> Config:
        """Return a config with the inner width; raise `ManifestError`."""
        hidden = config.get("n_embd")
        if isinstance(hidden, int):
            config = {"n_inner": 4 * hidden, **config}
        checked = self.settings.check(config)
        if int(checked["n_embd"]) % int(checked["n_head"]):
            raise refuse(f"The hidden size {hidden} is not a multiple of the {checked['n_head']} attention heads.")
        if len(config) != len(checked):
            raise refuse("The gpt2 family has no rotary settings.")
        return checked

    def read_other(self, key: str, value: object, found: object) -> Config:
        """Return nothing for settings of other heads than the language model's; raise `ManifestError`."""
        if key.startswith("summary_") or key == "n_ctx":
            return {}
        return super().read_other(key, value, {})

    def layers(self, config: Config) -> int:
        """Return the number of decoder layers."""
        return int(config["n_layer"])

    def hidden(self, config: Config) -> int:
        """Return the width of the hidden activations."""
        return int(config["n_embd"])

    def context(self, config: Config) -> int:
        """Return the longest sequence."""
        return int(config["n_positions"])

    def final_norm(self, config: Config) -> tuple[TensorSpec, ...]:
        """Return the tensors of the norm before the head."""
        return _norm(self.names.norm, self.hidden(config))

    def layer(self, config: Config, index: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one decoder layer."""
        hidden, inner, prefix = self.hidden(config), int(config["n_inner"]), f"{self.names.layer}.{index}."
        deviation = float(config["initializer_range"])
        # projections into the residual stream start smaller, by the number of additions to it (GPT-2 paper)
        smaller = deviation / sqrt(2 * self.layers(config))
        matrices = {
            "attn.c_attn": (hidden, 3 * hidden, deviation),
            "attn.c_proj": (hidden, hidden, smaller),
            "mlp.c_fc": (hidden, inner, deviation),
            "mlp.c_proj": (inner, hidden, smaller),
        }
        tensors: list[TensorSpec] = []
        for name, (rows, columns, spread) in matrices.items():
            tensors.append(TensorSpec(f"{prefix}{name}.weight", (rows, columns), True, spread))
        tensors.extend(zeros(f"{prefix}{name}.bias", columns) for name, (_, columns, _) in matrices.items())
        return (*tensors, *_norm(f"{prefix}ln_1", hidden), *_norm(f"{prefix}ln_2", hidden))


def _norm(name: str, width: int) -> tuple[TensorSpec, TensorSpec]:
    return ones(f"{name}.weight", width), zeros(f"{name}.bias", width)


GPT2 = Gpt2()
