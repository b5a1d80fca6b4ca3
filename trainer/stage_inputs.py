"""What a stage takes: checks of a cell's input and labels, of text or of images."""

from typing import Protocol

import torch
from torch import Tensor

from trainer.errors import StageError, StageReason
from trainer.families import family_of
from trainer.layout import StageSpec
from trainer.manifest import TaskManifest


class InputCheck(Protocol):
    """Refuses what a stage cannot compute with."""

    def check(self, x: Tensor, labels: Tensor | None) -> None:
        """Raise `StageError` for an input, or labels, of another type, shape or range."""
        ...


class TextInputs:
    """Sequences of any number and length that the model takes."""

    def __init__(self, manifest: TaskManifest, spec: StageSpec) -> None:
        family = family_of(manifest.family)
        self._spec = spec
        self._vocabulary = family.vocabulary(manifest.config)
        self._width = family.hidden(manifest.config)
        self._context = family.context(manifest.config)

    def check(self, x: Tensor, labels: Tensor | None) -> None:
        """Raise `StageError` unless x is tokens (B,T) or fp32 (B,T,D), and labels are (B,T) where they belong."""
        if self._spec.is_first:
            self._check_tokens("tokens", x)
        elif x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] != self._width:
            raise StageError(StageReason.BAD_SHAPE, f"The input must be fp32 (B, T, {self._width}).")
        if not 0 < x.shape[1] <= self._context or not x.shape[0]:
            raise StageError(StageReason.BAD_SHAPE, f"Sequences must have 1 to {self._context} tokens.")
        _check_presence(self._spec, labels)
        if labels is not None:
            self._check_tokens("labels", labels)
            if labels.shape != x.shape[:2]:
                raise StageError(StageReason.BAD_SHAPE, "The labels do not have the shape of the input.")

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        _check_integers(name, tokens)
        if tokens.dim() != 2 or not tokens.numel():
            raise StageError(StageReason.BAD_SHAPE, f"The {name} must have the shape (B, T).")
        _check_range(name, tokens, self._vocabulary)


class ImageInputs:
    """Images of the size that the task says, any number of them that batch norm can do with."""

    def __init__(self, manifest: TaskManifest, spec: StageSpec) -> None:
        family, size = family_of(manifest.family), manifest.example_size
        self._spec = spec
        self._classes = family.vocabulary(manifest.config)
        self._least = 2 if family.normalised(manifest.config, size) < 2 else 1
        self._shape = (
            family.example(manifest.config, size)
            if spec.is_first
            else family.boundary(manifest.config, size, spec.first)
        )

    def check(self, x: Tensor, labels: Tensor | None) -> None:
        """Raise `StageError` unless x is fp32 (B,C,H,W) as the task says, and labels are (B) where they belong."""
        if x.dtype != torch.float32:
            raise StageError(StageReason.BAD_TYPE, "Images and what becomes of them must be fp32.")
        if x.dim() != 4 or tuple(x.shape[1:]) != self._shape or x.shape[0] < self._least:
            given, wanted = tuple(x.shape), ", ".join(map(str, self._shape))
            raise StageError(StageReason.BAD_SHAPE, f"The input must have the shape (B, {wanted}), not {given}.")
        _check_presence(self._spec, labels)
        if labels is not None:
            _check_integers("labels", labels)
            if labels.shape != x.shape[:1]:
                raise StageError(StageReason.BAD_SHAPE, "There must be one label for each image.")
            _check_range("labels", labels, self._classes)


def inputs_of(manifest: TaskManifest, spec: StageSpec) -> InputCheck:
    """Return the checks of a stage."""
    return TextInputs(manifest, spec) if manifest.images is None else ImageInputs(manifest, spec)


def _check_presence(spec: StageSpec, labels: Tensor | None) -> None:
    if spec.is_last != (labels is not None):
        raise StageError(StageReason.BAD_SHAPE, "Labels belong to the last stage, and it needs them.")


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise StageError(StageReason.BAD_TYPE, f"The {name} must be 32- or 64-bit integers.")


def _check_range(name: str, tensor: Tensor, count: int) -> None:
    low, high = (int(value) for value in tensor.aminmax())
    if low < 0 or high >= count:
        raise StageError(StageReason.BAD_TOKEN, f"The {name} must be from 0 to {count - 1}.")
