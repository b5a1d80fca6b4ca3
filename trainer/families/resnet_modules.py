"""One stage of a ResNet made of `transformers`' own blocks, its parameters being views of a flat vector.

Shapes: B images, C channels, H height, W width, V classes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from trainer.families.dropout import Masks
from trainer.layout import Layout, StageSpec


class CellNorm(nn.BatchNorm2d):
    """Batch norm over the images of one cell, which says what they add to the running statistics and leaves these."""

    added: tuple[Tensor, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Return (B,C,H,W) normalised, by the cell itself in training and by the running statistics in use."""
        if not self.training:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        # running statistics that were zero are afterwards what the cell adds: its own, times the momentum
        mean, variance = torch.zeros(self.num_features), torch.zeros(self.num_features)
        self.added = mean, variance
        momentum = cast(float, self.momentum)
        return functional.batch_norm(input, mean, variance, self.weight, self.bias, True, momentum, self.eps)


class ResNetStage(nn.Module):
    """Stem (first stage), blocks `first … last − 1`, pooling and head (last stage)."""

    def __init__(self, model: Any, spec: StageSpec) -> None:
        super().__init__()
        self.masks = Masks(0)
        self._spec = spec
        blocks = [block for part in model.resnet.encoder.stages for block in part.layers]
        if spec.is_first:
            self.embedder = model.resnet.embedder
        self.layers = nn.ModuleDict({str(index): blocks[index] for index in range(spec.first, spec.last)})
        if spec.is_last:
            self.pooler, self.classifier = model.resnet.pooler, model.classifier

    def bind(self, model: nn.Module, layout: Layout, flat: Tensor) -> None:
        """Make every parameter and running statistic of this stage a view into `flat`."""
        self._ordered: list[nn.Parameter] = []
        self._norms: list[CellNorm] = []
        for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
            path, _, leaf = tensor.name.rpartition(".")
            owner, view = model.get_submodule(path), flat[start:stop].view(tensor.shape)
            if tensor.kept is None:
                self._ordered.append(nn.Parameter(view))
                setattr(owner, leaf, self._ordered[-1])
            else:
                setattr(owner, leaf, view)
                self._norms.extend([cast(CellNorm, owner)] if leaf == "running_mean" else [])

    def ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the layout."""
        return self._ordered

    def additions(self) -> list[Tensor]:
        """Return mean, variance and number of batches, times their weight, that the last cell adds to each norm's."""
        return [part for norm in self._norms for part in (*norm.added, torch.ones(()))]

    def forward(self, x: Tensor, labels: Tensor | None, boundaries: list[Tensor]) -> Tensor:
        """Return hidden (B,C,H,W), or at the last stage the loss of each image (B), without labels logits (B,V)."""
        hidden_BCHW = self.embedder(x) if self._spec.is_first else x
        for block in self.layers.values():
            hidden_BCHW = block(hidden_BCHW)
            boundaries.append(hidden_BCHW.detach())
        if not self._spec.is_last:
            return cast(Tensor, hidden_BCHW)
        logits_BV = self.classifier(self.pooler(hidden_BCHW))
        return logits_BV if labels is None else functional.cross_entropy(logits_BV, labels, reduction="none")


def build(whole: dict[str, object], spec: StageSpec, layout: Layout, flat: Tensor) -> ResNetStage:
    """Return one stage of the model that `whole` (a `config.json`) describes, on views into `flat`."""
    with torch.device("meta"):
        model: Any = ResNetForImageClassification(ResNetConfig(**cast(dict[str, Any], whole)))
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(owner, name, CellNorm(child.num_features, child.eps, child.momentum))
    stage = ResNetStage(model, spec)
    stage.bind(model, layout, flat)
    return stage
