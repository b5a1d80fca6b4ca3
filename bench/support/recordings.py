"""Real cells of a small Llama in training, recorded once: what honest workers and each cheat make of them.

An attack is a change of a recorded result or of the weights that it was computed with; few recordings serve
thousands of audits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from unittest import mock

import torch
from torch import Tensor

from trainer.data import Corpus, load_batches, standard_library
from trainer.families import linear
from trainer.local import train_locally, whole
from trainer.manifest import OptimizerSettings, TaskManifest, complete
from trainer.stage import CellKey, CellResult, Stage, build_stage, execute, stage_layout
from trainer.state import StageState
from trainer.tokens import byte_tokenizer

CONFIG: dict[str, int | float | bool | str] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}
STAGES = 3


@dataclass(frozen=True)
class Recording:
    """One cell: its place, its inputs, the stage's weights and those of the step before, the honest results."""

    stage: int
    step: int
    cell: int
    x: Tensor
    labels: Tensor | None
    gy: Tensor | None
    weights: Tensor
    stale: Tensor
    honest: CellResult


@dataclass
class Recordings:
    """Cells of every stage, and the stages to execute them again."""

    manifest: TaskManifest
    cells: list[list[Recording]]
    _stages: dict[tuple[int, bool], Stage] = field(default_factory=dict)

    def execute(self, one: Recording, weights: Tensor | None = None, is_plain: bool = False) -> CellResult:
        """Return the execution of a cell, with other weights or torch's own linear layers if so asked."""
        stage = self._stage(one.stage, is_plain)
        stage.load(one.weights if weights is None else weights)
        return execute(stage, one.x, one.labels, one.gy, CellKey(0, one.step, one.cell))

    def halves(self, one: Recording, is_plain: bool = False) -> CellResult:
        """Return a cell executed as two halves of its batch."""
        stage, rows = self._stage(one.stage, is_plain), one.x.shape[0] // 2
        stage.load(one.weights)
        given = (one.x, one.labels, one.gy)
        halves = [[None if part is None else part[at : at + rows] for part in given] for at in (0, rows)]
        parts = [execute(stage, x, labels, gy) for x, labels, gy in halves if x is not None]
        weight = 0.5 if stage.spec.is_last else 1.0  # the loss is a mean over the half batch
        gx = torch.cat([part.gx for part in parts]) * weight
        return CellResult(torch.cat([part.y for part in parts]), gx, (parts[0].gw + parts[1].gw) * weight, ())

    def _stage(self, index: int, is_plain: bool) -> Stage:
        if (index, is_plain) not in self._stages:
            with mock.patch.object(linear, "is_available", return_value=not is_plain and linear.is_available()):
                self._stages[index, is_plain] = build_stage(self.manifest, index)
        return self._stages[index, is_plain]

    @cached_property
    def layouts(self) -> list[tuple[tuple[str, int, int], ...]]:
        """Name, start and end of every tensor in a stage's flat vector."""
        layouts = [stage_layout(self.manifest, index) for index in range(STAGES)]
        return [
            tuple((tensor.name, *part) for tensor, part in zip(layout.tensors, layout.ranges, strict=True))
            for layout in layouts
        ]


def record(steps: int = 3, warmup: int = 12, microbatches: int = 4) -> Recordings:
    """Return the cells of `steps` consecutive steps of a training that has done `warmup` steps before."""
    settings = OptimizerSettings(learning_rate=6e-4, warmup_steps=4)
    draft = TaskManifest(
        "llama",
        dict(CONFIG),
        stages=STAGES,
        cuts=(1, 1, 1),
        batch=2,
        microbatches=microbatches,
        sequence=32,
        optimizer=settings,
    )
    manifest = complete(draft)
    data = load_batches(Corpus((standard_library(),), limit=1 << 18), byte_tokenizer(), manifest)
    recordings = Recordings(manifest, [[] for _ in range(STAGES)])
    before = train_locally(manifest, data, warmup)
    for step in range(warmup + 1, warmup + 1 + steps):
        after = train_locally(manifest, data, step, state=before)
        weights, stale = _split(manifest, after), _split(manifest, before)
        for cell in range(microbatches):
            _record_cell(recordings, (step, cell), data.batch(step + 1, cell), (weights, stale))
        before = after
    return recordings


def _record_cell(
    recordings: Recordings,
    place: tuple[int, int],
    batch: tuple[Tensor, Tensor],
    states: tuple[list[Tensor], list[Tensor]],
) -> None:
    weights, stale = states
    key = CellKey(0, *place)
    stages = [recordings._stage(index, False) for index in range(STAGES)]
    inputs = [batch[0]]
    for index, stage in enumerate(stages[:-1]):
        stage.load(weights[index])
        inputs.append(stage.forward(key, inputs[-1], None).y)
        stage.drop(key)
    gy: Tensor | None = None
    for index in reversed(range(STAGES)):
        stages[index].load(weights[index])
        labels = batch[1] if index == STAGES - 1 else None
        honest = execute(stages[index], inputs[index], labels, gy, key)
        one = Recording(index, *place, inputs[index], labels, gy, weights[index], stale[index], honest)
        recordings.cells[index].append(one)
        gy = honest.gx


def _split(manifest: TaskManifest, state: StageState) -> list[Tensor]:
    """Return the stages' weights out of the whole model's."""
    uncut = stage_layout(whole(manifest), 0)
    flat = {t.name: state.weights[a:b] for t, (a, b) in zip(uncut.tensors, uncut.ranges, strict=True)}
    return [torch.cat([flat[t.name] for t in stage_layout(manifest, index).tensors]) for index in range(STAGES)]


Attack = Callable[[Recordings, Recording], CellResult]


def _noise(tensor: Tensor, ratio: float, one: Recording) -> Tensor:
    if not tensor.numel():
        return tensor
    generator = torch.Generator().manual_seed(1000 * one.step + 10 * one.cell + one.stage)
    scale = ratio * float(tensor.square().mean().sqrt())
    return tensor + scale * torch.randn(tensor.shape, generator=generator)


def change(parts: str, how: Callable[[Tensor, Recording], Tensor]) -> Attack:
    """Return the attack that alters the named parts of the honest result."""

    def attack(_: Recordings, one: Recording) -> CellResult:
        names = parts.split()
        return one.honest._replace(**{name: how(getattr(one.honest, name), one) for name in names})

    return attack


def scale(parts: str, factor: float) -> Attack:
    """Return the attack that scales the named parts."""
    return change(parts, lambda tensor, _: tensor * factor)


def noise(parts: str, ratio: float) -> Attack:
    """Return the attack that adds Gaussian noise of this share of the root mean square."""
    return change(parts, lambda tensor, one: _noise(tensor, ratio, one))


def random(parts: str) -> Attack:
    """Return the attack that sends Gaussian noise of the honest size instead of the named parts."""
    return change(parts, lambda tensor, one: _noise(tensor, 1.0, one) - tensor)


def int8(recordings: Recordings, one: Recording) -> CellResult:
    """Compute with weights rounded to int8, one scale a tensor."""
    rounded = one.weights.clone()
    for _, start, stop in recordings.layouts[one.stage]:
        step = one.weights[start:stop].abs().max() / 127
        rounded[start:stop] = (one.weights[start:stop] / step).round() * step
    return recordings.execute(one, rounded)


def skipped_layer(recordings: Recordings, one: Recording) -> CellResult:
    """Leave the stage's layer out: its output projections are zero."""
    changed = one.weights.clone()
    for name, start, stop in recordings.layouts[one.stage]:
        if "o_proj" in name or "down_proj" in name:
            changed[start:stop] = 0
    return recordings.execute(one, changed)


def stale(recordings: Recordings, one: Recording) -> CellResult:
    """Compute with the weights of the step before."""
    return recordings.execute(one, one.stale)


def bf16(recordings: Recordings, one: Recording) -> CellResult:
    """Compute in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        y, gx, gw, _ = recordings.execute(one, is_plain=True)
    return CellResult(y.float(), gx.float(), gw.float(), ())


def replayed(recordings: Recordings, one: Recording) -> CellResult:
    """Send the results of another micro-batch of the same stage again."""
    cells = recordings.cells[one.stage]
    return cells[(cells.index(one) + 1) % len(cells)].honest


def gaussian(parts: str, sigma: float) -> Attack:
    """Return the attack that sends Gaussian noise of variance `sigma` (Σ = σ·I) instead of the named parts."""

    def drawn(tensor: Tensor, one: Recording) -> Tensor:
        generator = torch.Generator().manual_seed(77 * one.step + one.cell)
        return torch.randn(tensor.shape, generator=generator) * sigma**0.5

    return change(parts, drawn)


def steered(_: Recordings, one: Recording) -> CellResult:
    """Add a tiny gradient in embedding rows of tokens that do not occur, which AdamW makes as large as any other."""
    gw = one.honest.gw.clone()
    rows = gw[: gw.numel() // 32 * 32].view(-1, 32)
    dead = rows.abs().amax(1) == 0
    rows[dead.nonzero()[:1]] += 1e-5 * gw.square().mean().sqrt()
    return one.honest._replace(gw=gw)


RESULTS: dict[str, Attack] = {
    "sign flip": scale("y gx", -1.0),
    "sign flip of gw": scale("gw", -1.0),
    "zero gradients": scale("gx gw", 0.0),
    "random gradients": random("gx gw"),
    "y x 1.01": scale("y", 1.01),
    "gx x 1.01": scale("gx", 1.01),
    "gw x 1.01": scale("gw", 1.01),
    "y x 1.001": scale("y", 1.001),
    "noise 1e-2": noise("y gx gw", 1e-2),
    "noise 1e-3": noise("y gx gw", 1e-3),
    "layer skipped": skipped_layer,
    "gw skipped": scale("gw", 0.0),
    "int8 weights": int8,
    "bf16 compute": bf16,
    "stale weights": stale,
    "replayed cell": replayed,
    "gw mean shift": change("gw", lambda tensor, _: tensor + tensor.std()),
    "gw Gaussian 30 I": gaussian("gw", 30.0),
    "unseen rows steered": steered,
}
"""Changes of results that deviate by more than 100 τ somewhere, or where nothing may deviate: fraud."""

SMALL: dict[str, Attack] = {
    "gx x 1.001": scale("gx", 1.001),
    "gw x 1.001": scale("gw", 1.001),
    "noise 1e-4": noise("y gx gw", 1e-4),
}
"""Changes between τ and 100 τ: a fault, which honest hardware does not make but a broken one may."""

HONEST: dict[str, Attack] = {
    "same kernels": lambda _, one: one.honest,
    "torch's own kernels": lambda recordings, one: recordings.execute(one, is_plain=True),
    "batch split": lambda recordings, one: recordings.halves(one),
    "both": lambda recordings, one: recordings.halves(one, is_plain=True),
}
"""What honest peers on other hardware make of a cell."""
