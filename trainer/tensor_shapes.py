"""Which tensors a task's messages must carry: their shapes and their encoding."""

from typing import NamedTuple

from trainer.families import family_of
from trainer.layout import Shape
from trainer.manifest import TaskManifest
from trainer.messages import Activation, Gradient, Labels, Partial, Tied, Tokens
from trainer.payloads import Dtype, MessageError, Reason
from trainer.worker_step import CellData


class Form(NamedTuple):
    """Encoding and shape of a tensor."""

    dtype: Dtype
    shape: Shape


def input_of(manifest: TaskManifest, stage: int) -> Form:
    """Return what x of a cell is at a stage: tokens or pixels at the first, else what the stage before puts out."""
    if stage:
        return Form(manifest.wire, manifest.boundary(manifest.stage(stage).first))
    example = family_of(manifest.family).example(manifest.config, manifest.example_size)
    return Form(Dtype.INT32 if manifest.images is None else Dtype.FP32, (manifest.batch, *example))


def gradient_of(manifest: TaskManifest, stage: int) -> Form:
    """Return what gy of a cell is at a stage: labels at the last, else the gradient of what the stage puts out."""
    if stage < manifest.stages - 1:
        return Form(manifest.wire, manifest.boundary(manifest.stage(stage).last))
    return Form(Dtype.INT32, (manifest.batch, manifest.sequence) if manifest.images is None else (manifest.batch,))


def check_shape(manifest: TaskManifest, message: CellData) -> None:
    """Raise `MessageError` unless the tensor is one of a micro-batch of this task, encoded as it says."""
    if isinstance(message, Activation | Gradient) and message.stage >= manifest.stages:
        raise MessageError(Reason.WRONG_STAGE, f"stage {message.stage} of {manifest.stages}")
    match message:
        case Tokens():
            wanted = input_of(manifest, 0)
        case Labels():
            wanted = gradient_of(manifest, manifest.stages - 1)
        case Activation():
            wanted = gradient_of(manifest, message.stage)
        case Gradient():
            wanted = input_of(manifest, message.stage)
    payload = message.payload[0]
    if payload.shape != wanted.shape:
        raise MessageError(Reason.TENSOR_SHAPE, f"{payload.shape}, not {wanted.shape}")
    if payload.dtype is not wanted.dtype:
        raise MessageError(Reason.TENSOR_KIND, f"{payload.dtype}, not {wanted.dtype}")


def check_part(manifest: TaskManifest, message: Partial | Tied, size: int) -> None:
    """Raise `MessageError` unless a part has `size` numbers, and a sum is encoded as the manifest says."""
    if message.payload[0].shape != (size,):
        raise MessageError(Reason.TENSOR_SHAPE)
    if isinstance(message, Partial) and message.payload[0].dtype is not manifest.wire:
        raise MessageError(Reason.TENSOR_KIND, f"{message.payload[0].dtype}, not {manifest.wire}")
