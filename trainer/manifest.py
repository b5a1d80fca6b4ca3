"""The task manifest: everything that fixes a training run, as canonical JSON whose hash is on chain."""

from functools import cached_property
from math import isfinite
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trainer.content import address_of
from trainer.errors import ManifestError, ManifestReason
from trainer.families import family_of
from trainer.families.base import Config, Costs
from trainer.layout import StageSpec

__all__ = [
    "AuditSettings",
    "ManifestError",
    "ManifestReason",
    "OptimizerSettings",
    "TaskManifest",
    "complete",
    "decode_manifest",
    "encode_manifest",
]

VERSION = 1
MAX_MANIFEST_BYTES = 64 * 1024
MAX_CELL_BYTES = 1 << 30
MAX_PARAMETERS = 1 << 38
BYTES_TOKENIZER = "bytes"

_Count = Annotated[int, Meta(ge=0, le=2**31)]
_Text = Annotated[str, Meta(max_length=64)]


class OptimizerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov and Hutter 2019) and its schedule: linear warm-up, then constant or cosine.

    Weight decay acts on matrices only; a cosine ends at `min_ratio` of the learning rate.
    """

    name: _Text = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: _Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_ratio: float = 0.1


class AuditSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Audit rate in basis points, ring depth in steps, and replicas that compute every cell."""

    rate: Annotated[int, Meta(ge=0, le=10_000)] = 1000
    depth: Annotated[int, Meta(ge=1, le=1024)] = 8
    redundancy: Annotated[int, Meta(ge=1, le=16)] = 1


class TaskManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A training run: model, initial weights, tokenizer, stages, optimiser, batches and precision.

    `cuts` is the number of decoder layers of each stage. `batch` is sequences per micro-batch. `initial` names
    each stage's state before step 1 by its hex root; empty means drawn from `seed`. `start` counts the steps
    done before this run, for the data order and the schedule. `tokenizer` is the hex address of a
    tokenizer.json, or `bytes`. A draft may leave `cuts` empty and settings out of `config`: see `complete`.
    """

    family: _Text
    config: dict[_Text, int | float | bool | str]
    version: _Count = VERSION
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    initial: Annotated[tuple[_Text, ...], Meta(max_length=256)] = ()
    start: _Count = 0
    tokenizer: _Text = BYTES_TOKENIZER
    stages: _Count = 1
    cuts: Annotated[tuple[_Count, ...], Meta(max_length=256)] = ()
    replicas: _Count = 1
    optimizer: OptimizerSettings = OptimizerSettings()
    batch: _Count = 8
    microbatches: _Count = 4
    sequence: _Count = 128
    steps: _Count = 100
    precision: _Text = "fp32"
    audit: AuditSettings = AuditSettings()

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return family_of(self.family).vocabulary(self.config)

    @property
    def hidden(self) -> int:
        """Width D of the hidden activations."""
        return family_of(self.family).hidden(self.config)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return family_of(self.family).layers(self.config)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step consumes."""
        return self.batch * self.microbatches * self.sequence

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, those before this run included."""
        return self.start + self.steps

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return family_of(self.family).layout(self.config, StageSpec(0, 1, 0, self.layers)).total

    @cached_property
    def address(self) -> bytes:
        """The 32-byte content address of the canonical bytes."""
        return address_of(encode_manifest(self))

    def stage(self, index: int) -> StageSpec:
        """Return the place of stage `index` in the model."""
        if not 0 <= index < self.stages:
            raise IndexError(f"stage {index} of {self.stages}")
        first = sum(self.cuts[:index])
        return StageSpec(index, self.stages, first, first + self.cuts[index])


def encode_manifest(manifest: TaskManifest) -> bytes:
    """Return the canonical JSON: sorted keys, no spaces, shortest floats."""
    return msgspec.json.encode(manifest, order="sorted")


def decode_manifest(data: bytes) -> TaskManifest:
    """Return the complete manifest that `data` canonically encodes; raise `ManifestError`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            ManifestReason.TOO_LARGE,
            f"The manifest has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read.",
        )
    try:
        manifest = msgspec.json.decode(data, type=TaskManifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestError(ManifestReason.UNREADABLE, f"The manifest cannot be read: {str(error)[:200]}.") from None
    if not manifest.cuts or encode_manifest(complete(manifest)) != data:
        raise ManifestError(ManifestReason.NOT_CANONICAL, "The manifest is not in its one canonical form.")
    return manifest


def complete(draft: TaskManifest) -> TaskManifest:
    """Return `draft` checked, its config filled with defaults and its cuts chosen; raise `ManifestError`."""
    if draft.version != VERSION:
        raise ManifestError(ManifestReason.UNKNOWN_VERSION, f"Manifest version {draft.version} is not known.")
    family = family_of(draft.family)
    config = family.complete(draft.config)
    _check_sizes(draft)
    _check_optimizer(draft.optimizer)
    _check_names(draft)
    _check_start(draft)
    _check_fit(draft, config)
    costs = family.costs(config, draft.sequence)
    layers = family.layers(config)
    cuts = draft.cuts or balanced_cuts(layers, draft.stages, costs)
    if len(cuts) != draft.stages or min(cuts) < 1 or sum(cuts) != layers:
        raise ManifestError(
            ManifestReason.BAD_CUTS,
            f"The cuts must be {draft.stages} positive numbers of layers that add up to {layers}.",
        )
    return msgspec.structs.replace(draft, config=config, cuts=tuple(cuts))


def balanced_cuts(layers: int, stages: int, costs: Costs) -> tuple[int, ...]:
    """Return layers per stage that make the slowest stage fastest, the head counted in the last."""

    def cost(index: int, held: int) -> int:
        ends = (costs.embedding if index == 0 else 0) + (costs.head if index == stages - 1 else 0)
        return held * costs.layer + ends

    # best[k]: (slowest stage, sum of squares, cuts) of the stages so far over k layers
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for index in range(stages):
        extended: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for done, (slowest, squares, cuts) in best.items():
            for held in range(1, layers - done - (stages - index - 1) + 1):
                value = cost(index, held)
                option = (max(slowest, value), squares + value * value, (*cuts, held))
                if done + held not in extended or option < extended[done + held]:
                    extended[done + held] = option
        best = extended
    return best[layers][2]


def _check_sizes(draft: TaskManifest) -> None:
    bounds = {"stages": 256, "replicas": 256, "batch": 4096, "microbatches": 1024, "sequence": 1 << 20}
    for name, bound in {**bounds, "steps": 2**31}.items():
        value = getattr(draft, name)
        if not 1 <= value <= bound:
            raise ManifestError(
                ManifestReason.BAD_SIZE, f"The setting {name} is {value}; it must be from 1 to {bound}."
            )
    if not 0 <= draft.seed < 2**63:
        raise ManifestError(ManifestReason.BAD_SIZE, f"The seed is {draft.seed}; it must be from 0 to {2**63 - 1}.")
    if draft.audit.redundancy > draft.replicas:
        raise ManifestError(
            ManifestReason.BAD_SIZE,
            f"A redundancy of {draft.audit.redundancy} needs as many replicas; there are {draft.replicas}.",
        )


def _check_fit(draft: TaskManifest, config: Config) -> None:
    family = family_of(draft.family)
    layers, context = family.layers(config), family.context(config)
    if draft.stages > layers:
        raise ManifestError(
            ManifestReason.TOO_MANY_STAGES,
            f"A model of {layers} layers cannot be cut into {draft.stages} stages.",
            f"Use at most {layers} stages.",
        )
    if family.layout(config, StageSpec(0, 1, 0, layers)).total > MAX_PARAMETERS:
        raise ManifestError(ManifestReason.BAD_SIZE, f"The model has more than {MAX_PARAMETERS:,} parameters.")
    if draft.sequence > context:
        raise ManifestError(
            ManifestReason.SEQUENCE_TOO_LONG,
            f"Sequences of {draft.sequence} tokens exceed the model's context of {context}.",
        )
    width = max(family.hidden(config), family.vocabulary(config))
    if 4 * draft.batch * draft.sequence * width > MAX_CELL_BYTES:
        raise ManifestError(
            ManifestReason.CELL_TOO_LARGE,
            f"One micro-batch of {draft.batch} × {draft.sequence} tokens needs tensors of more than 1 GiB.",
            "Use a smaller batch and more micro-batches.",
        )


def _check_optimizer(settings: OptimizerSettings) -> None:
    ranges = {
        "learning_rate": 0 < settings.learning_rate <= 10,
        "beta1": 0 <= settings.beta1 < 1,
        "beta2": 0 < settings.beta2 < 1,
        "eps": 0 < settings.eps <= 1,
        "weight_decay": 0 <= settings.weight_decay <= 10,
        "min_ratio": 0 <= settings.min_ratio <= 1,
    }
    if settings.name != "adamw":
        raise ManifestError(
            ManifestReason.BAD_OPTIMIZER, f"The optimiser {settings.name!r} is not known.", "Use adamw."
        )
    for name, is_right in ranges.items():
        value = getattr(settings, name)
        if not is_right or not isfinite(value):
            raise ManifestError(ManifestReason.BAD_OPTIMIZER, f"The optimiser's {name} cannot be {value}.")


def _check_names(draft: TaskManifest) -> None:
    if draft.precision != "fp32":
        raise ManifestError(
            ManifestReason.BAD_PRECISION, f"The precision {draft.precision!r} is not known.", "Use fp32."
        )
    if draft.tokenizer != BYTES_TOKENIZER and not _is_address(draft.tokenizer):
        raise ManifestError(
            ManifestReason.BAD_ADDRESS,
            f"The tokenizer must be a 64-digit hexadecimal address or {BYTES_TOKENIZER!r}.",
        )
    if not all(_is_address(root) for root in draft.initial):
        raise ManifestError(ManifestReason.BAD_ADDRESS, "Initial states must be 64-digit hexadecimal roots.")


def _is_address(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _check_start(draft: TaskManifest) -> None:
    if len(draft.initial) not in (0, draft.stages):
        raise ManifestError(
            ManifestReason.BAD_START,
            f"There are {len(draft.initial)} initial states for {draft.stages} stages.",
        )
    if draft.start and not draft.initial:
        raise ManifestError(ManifestReason.BAD_START, "A run that starts after other steps needs initial states.")
