"""Registry of model families: code that ships with the peer, named by a manifest and never received."""

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config, Costs, Family
from trainer.families.gpt2 import GPT2
from trainer.families.llama import LLAMA, QWEN2
from trainer.families.resnet import RESNET

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, GPT2, QWEN2, RESNET)}

__all__ = ["FAMILIES", "Config", "Costs", "Family", "family_of"]


def family_of(name: str) -> Family:
    """Return the family called `name`; raise `ManifestError` for an unknown one."""
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ManifestError(
            ManifestReason.UNKNOWN_FAMILY,
            f"The model family {name[:64]!r} is not known.",
            f"Known families: {known}.",
        )
    return family
