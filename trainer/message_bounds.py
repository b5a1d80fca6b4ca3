"""What of a task must fit into one message: checked before anybody works for it."""

from typing import TYPE_CHECKING

from trainer.errors import ManifestError, ManifestReason
from trainer.families import family_of
from trainer.payloads import WIRE, TensorPayload

if TYPE_CHECKING:
    from trainer.manifest import TaskManifest

MAX_MESSAGE_BYTES = 1 << 30
"""The tensors of one message; peers take no larger frame."""


def check_sums(manifest: "TaskManifest") -> None:
    """Raise `ManifestError` if replicas could not send each other a stage's sum of gradients, or ends a tied one."""
    if manifest.lora is not None:
        return  # adapters are small, and their ranks are bounded
    family = family_of(manifest.family)
    for index in range(manifest.stages):
        layout = family.layout(manifest.config, manifest.stage(index))
        is_tied = manifest.tied and manifest.stages > 1
        tied = sum(
            stop - start
            for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True)
            if is_tied and tensor.name == manifest.tied
        )
        total = layout.total if manifest.replicas > 1 and index in manifest.seated else 0
        summed = TensorPayload(WIRE[manifest.compression], (total,), memoryview(b"")).nbytes
        if max(summed, 4 * tied) > MAX_MESSAGE_BYTES:
            raise ManifestError(
                ManifestReason.STAGE_TOO_LARGE,
                f"The gradients of stage {index}, {layout.total:,} numbers, do not fit into one message of 1 GiB.",
                "Use more stages, --compress bf16 or int8, or one replica of each.",
            )
