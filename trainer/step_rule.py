"""The optimiser's step of one stage from its mean gradient: what its worker does, and who audits it does again.

Everything here is portable arithmetic on given bits: the same state, gradient and norms lead to the same root on every
machine.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.content import address_of
from trainer.joint import clip_scale, squared_norm, tied_part
from trainer.manifest import TaskManifest
from trainer.optimizer import build_optimizer
from trainer.stage import stage_layout
from trainer.state import StageState
from trainer.tensors import buffer_of

if TYPE_CHECKING:
    from torch import Tensor


class StepRule:
    """How stage `index` of a task makes the next state."""

    def __init__(self, manifest: TaskManifest, index: int) -> None:
        self.tied = tied_part(manifest, index)
        self._optimizer = build_optimizer(manifest, index)
        self._trained = stage_layout(manifest, index).trained
        self._counted_elsewhere = self.tied if index else slice(0, 0)
        self._clip = manifest.optimizer.clip

    def join(self, gradient: "Tensor", far: "Tensor | None") -> tuple[float, bytes]:
        """Add the other end's part to the tied gradient in place; return the stage's squared norm, that part's digest.

        The first stage counts the tied tensor in the norm.
        """
        part = gradient[self.tied]
        if far is not None:
            part.add_(far)
        digest = address_of(buffer_of(part)) if far is not None else b""
        return squared_norm(gradient[: self._trained], self._counted_elsewhere), digest

    def apply(self, state: StageState, gradient: "Tensor", squares: Sequence[float]) -> StageState:
        """Return the state after one more step; `squares` are all stages' squared norms, none where it is alone."""
        scale = 1.0
        if self._clip:
            scale = clip_scale(self._clip, squares or (squared_norm(gradient[: self._trained]),))
        return self._optimizer.apply(state, gradient, scale)
