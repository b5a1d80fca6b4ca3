"""What a task of classifying images adds to a manifest, and what it cannot be combined with."""

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config, Family
from trainer.layout import Shape

if TYPE_CHECKING:
    from trainer.manifest import TaskManifest

MAX_SIZE = 4096


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Examples are square images, each with one label; `size` is the number of pixels of a side."""

    size: Annotated[int, Meta(ge=0, le=2**31)]


def check_kind(draft: "TaskManifest", family: Family, config: Config) -> None:
    """Raise `ManifestError` unless the examples are of the kind that the family takes, and may be combined so."""
    if (draft.images is not None) != (family.kind == "images"):
        raise _refuse(f"The {family.name} family is trained on {family.kind}.", "Give data of that kind.")
    if draft.images is None:
        return
    if not 1 <= draft.images.size <= MAX_SIZE:
        raise _refuse(f"The image size is {draft.images.size}; it must be from 1 to {MAX_SIZE} pixels.")
    if draft.sequence != 1:
        raise _refuse(f"An image is an example of its own, not a sequence of {draft.sequence}.", "Use a sequence of 1.")
    if draft.compression != "none":
        raise ManifestError(
            ManifestReason.BAD_COMPRESSION,
            f"Running statistics would not be exact with a compression of {draft.compression}.",
            "Leave out --compress.",
        )
    least = family.normalised(config, draft.images.size)
    if draft.batch * least < 2:
        raise _refuse(
            "Batch norm needs two values of a channel, and one image of this size leaves one.",
            "Use a batch of at least 2, or larger images.",
        )


def volume(shape: Shape) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for length in shape:
        count *= length
    return count


def _refuse(sentence: str, hint: str = "") -> ManifestError:
    return ManifestError(ManifestReason.BAD_IMAGES, sentence, hint)
