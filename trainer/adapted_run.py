"""The frozen weights of a run that trains adapters: found when it begins, found again when it goes on."""

from dataclasses import dataclass
from pathlib import Path

from trainer.adapters import LoraSettings, LoraWish
from trainer.base_weights import StageBase
from trainer.checkpoint import Checkpoint
from trainer.errors import CheckpointError, CheckpointReason, ManifestError, ManifestReason
from trainer.families import family_of
from trainer.pretrained import Pretrained, frozen_base, read_pretrained


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """Weights under adapters, and the folder that they are from."""

    folder: Path
    base: StageBase


def lora_wish(rank: int | None, alpha: int, targets: tuple[str, ...], dropout: float) -> LoraWish | None:
    """Return the adapters that a user asks for, None for none; raise `ManifestError` for details without a rank."""
    if rank is not None:
        return LoraWish(rank, alpha, targets, dropout)
    if alpha or targets or dropout:
        raise ManifestError(
            ManifestReason.BAD_ADAPTERS,
            "The details of adapters are given, but no rank.",
            "Give --lora RANK, such as --lora 8, or leave out the other --lora flags.",
        )
    return None


def adapters_on(model: Pretrained, wish: LoraWish | None) -> tuple[LoraSettings | None, FrozenModel | None]:
    """Return the settings of adapters on a model, and its weights; raise `TrainerError`."""
    if wish is None:
        return None, None
    base = frozen_base(model)
    family = family_of(model.family)
    settings = wish.settings(family, family.complete(model.config), base.addresses)
    return settings, FrozenModel(model.weights[0].parent.resolve(), base)


def frozen_again(checkpoint: Checkpoint, model: str = "") -> FrozenModel | None:
    """Return the weights under a checkpoint's adapters, from the folder `model` or from where they were.

    Raise `TrainerError` where they are not there, or others than the run was trained on.
    """
    lora = checkpoint.manifest.lora
    if lora is None:
        return None
    folder = Path(model) if model and Path(model).is_dir() else Path(checkpoint.base)
    if not folder.is_dir():
        raise CheckpointError(
            CheckpointReason.OTHER_BASE,
            f"The model {folder} that the adapters were trained on is not there.",
            "Give its folder with --model.",
        )
    found = FrozenModel(folder.resolve(), frozen_base(read_pretrained(folder)))
    if found.base.addresses != lora.base:
        raise CheckpointError(
            CheckpointReason.OTHER_BASE,
            f"The model in {folder} is not the one that the adapters were trained on.",
            "Give the folder of that model with --model.",
        )
    return found
