"""The task manifest: everything that fixes a training run, as canonical JSON whose hash is on chain."""

from functools import cached_property
from math import isfinite
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trainer.adapters import LoraSettings, adapter_layout, checked_lora
from trainer.content import address_of
from trainer.errors import ManifestError, ManifestReason
from trainer.families import family_of
from trainer.families.base import Config, Costs
from trainer.image_settings import ImageSettings, check_kind, volume
from trainer.layout import Layout, Shape, StageSpec
from trainer.message_bounds import MAX_MESSAGE_BYTES, check_sums
from trainer.payloads import WIRE, Dtype
from trainer.precision import BF16, FP32
from trainer.redundancy import check_redundancy, quorum_of

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
MAX_PARAMETERS = 1 << 38
BYTES_TOKENIZER = "bytes"

_Count = Annotated[int, Meta(ge=0, le=2**31)]
_Text = Annotated[str, Meta(max_length=64)]


class OptimizerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov and Hutter 2019) and its schedule: linear warm-up, then constant or cosine.

    Weight decay acts on matrices only; a cosine ends at `min_ratio` of the learning rate. A mean gradient of the
    whole model that is longer than `clip` is scaled down to it; 0 leaves every gradient as it is.
    """

    name: _Text = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
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
    tokenizer.json, or `bytes`. With `lora` adapters are trained, and the weights are given and frozen.
    In a `private` run the client holds the first and the last stage itself; both count in `stages`.
    With `images` the examples are images with a label each, `sequence` is 1, and `tokenizer` names their classes.
    A draft may leave `cuts` empty and settings out of `config`: see `complete`.
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
    compression: _Text = "none"
    audit: AuditSettings = AuditSettings()
    lora: LoraSettings | None = None
    private: bool = False
    images: ImageSettings | None = None

    @property
    def seated(self) -> range:
        """The stages that the chain gives seats for, its stage 0 first: all, or all but the client's two ends."""
        return range(1, self.stages - 1) if self.private else range(self.stages)

    @property
    def quorum(self) -> int:
        """How many equal results of a cell count: one, or with redundancy most of a team's."""
        return quorum_of(self.audit.redundancy)

    @property
    def wire(self) -> Dtype:
        """Element type of activations, gradients and partial sums on the wire."""
        return WIRE[self.compression]

    @property
    def tied(self) -> str:
        """Name of the tensor that both end stages train, empty if there is none."""
        return family_of(self.family).tied(self.config) if self.stages > 1 and self.lora is None else ""

    @property
    def is_joint(self) -> bool:
        """Whether a stage's optimiser step needs something of the other stages' gradients."""
        return self.stages > 1 and (self.optimizer.clip > 0 or bool(self.tied))

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return family_of(self.family).vocabulary(self.config)

    @property
    def hidden(self) -> int:
        """Width D of the hidden activations."""
        return family_of(self.family).hidden(self.config)

    @property
    def example_size(self) -> int:
        """Tokens of a sequence, or pixels of an image's side."""
        return self.sequence if self.images is None else self.images.size

    @property
    def positions(self) -> int:
        """How often a weight is used in a cell at most: once for each token or pixel."""
        return self.batch * (self.sequence if self.images is None else self.images.size**2)

    def boundary(self, layers: int) -> Shape:
        """Return the shape of a micro-batch after so many layers: (B,T,D) or (B,C,H,W)."""
        return self.batch, *family_of(self.family).boundary(self.config, self.example_size, layers)

    @property
    def layers(self) -> int:
        """Number of decoder layers, or of blocks."""
        return family_of(self.family).layers(self.config)

    @property
    def tokens_per_step(self) -> int:
        """Tokens, or images, that one optimiser step consumes."""
        return self.batch * self.microbatches * self.sequence

    def examples(self, step: int, microbatch: int) -> range:
        """Return the numbers, in the order of the whole training, of a micro-batch's examples; raise `IndexError`."""
        if step < 1 or not 0 <= microbatch < self.microbatches:
            raise IndexError(f"no micro-batch {microbatch} in step {step}")
        first = ((self.start + step - 1) * self.microbatches + microbatch) * self.batch
        return range(first, first + self.batch)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, those before this run included."""
        return self.start + self.steps

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, without adapters."""
        return self.whole_layout.total

    @property
    def whole_layout(self) -> Layout:
        """Weights of the uncut model, without adapters."""
        return family_of(self.family).layout(self.config, StageSpec(0, 1, 0, self.layers))

    def trained_layout(self, spec: StageSpec) -> Layout:
        """Return what a stage trains: its weights, or the adapters beside them."""
        family = family_of(self.family)
        if self.lora is None:
            return family.layout(self.config, spec)
        return adapter_layout(self.lora, family, self.config, spec)

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
    _check_private(draft)
    check_redundancy(draft)
    _check_fit(draft, config)
    costs = family.costs(config, draft.example_size)
    layers = family.layers(config)
    cuts = draft.cuts or _default_cuts(draft, layers, costs)
    is_held = len(cuts) == draft.stages and min(cuts[index] for index in draft.seated) >= 1
    if not is_held or sum(cuts) != layers:
        raise ManifestError(
            ManifestReason.BAD_CUTS,
            f"The cuts must be {draft.stages} positive numbers of layers that add up to {layers}.",
        )
    lora = None if draft.lora is None else checked_lora(draft.lora, family, config)
    manifest = msgspec.structs.replace(draft, config=config, cuts=tuple(cuts), lora=lora)
    check_sums(manifest)
    return manifest


def _default_cuts(draft: TaskManifest, layers: int, costs: Costs) -> tuple[int, ...]:
    if draft.private:
        return (0, *balanced_cuts(layers, len(draft.seated), Costs(costs.layer, 0, 0, costs.each)), 0)
    return balanced_cuts(layers, draft.stages, costs)


def balanced_cuts(layers: int, stages: int, costs: Costs) -> tuple[int, ...]:
    """Return layers per stage that make the slowest stage fastest, the head counted in the last."""

    def cost(index: int, done: int, held: int) -> int:
        ends = (costs.embedding if index == 0 else 0) + (costs.head if index == stages - 1 else 0)
        return costs.of(done, done + held) + ends

    # best[k]: (slowest stage, sum of squares, cuts) of the stages so far over k layers
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for index in range(stages):
        extended: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for done, (slowest, squares, cuts) in best.items():
            for held in range(1, layers - done - (stages - index - 1) + 1):
                value = cost(index, done, held)
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


def _check_private(draft: TaskManifest) -> None:
    if draft.private and not draft.seated:
        raise ManifestError(
            ManifestReason.NOT_PRIVATE,
            "A private run needs a stage between the client's two ends.",
            "Use at least one stage.",
        )
    if draft.private and draft.lora is not None:
        raise ManifestError(
            ManifestReason.NOT_PRIVATE,
            "Adapters cannot be trained in a private run: whoever has the model they stand on can read its inputs.",
            "Leave out --lora or --private.",
        )


def _check_fit(draft: TaskManifest, config: Config) -> None:
    family = family_of(draft.family)
    check_kind(draft, family, config)
    layers, context = family.layers(config), family.context(config)
    stages = len(draft.seated)
    if stages > layers:
        raise ManifestError(
            ManifestReason.TOO_MANY_STAGES,
            f"A model of {layers} layers cannot be cut into {stages} stages.",
            f"Use at most {layers} stages.",
        )
    if family.layout(config, StageSpec(0, 1, 0, layers)).total > MAX_PARAMETERS:
        raise ManifestError(ManifestReason.BAD_SIZE, f"The model has more than {MAX_PARAMETERS:,} parameters.")
    if draft.sequence > context:
        raise ManifestError(
            ManifestReason.SEQUENCE_TOO_LONG,
            f"Sequences of {draft.sequence} tokens exceed the model's context of {context}.",
        )
    widest = max(volume(family.boundary(config, draft.example_size, done)) for done in range(layers + 1))
    widest = max(widest, volume(family.example(config, draft.example_size)), draft.sequence * family.vocabulary(config))
    if 4 * draft.batch * widest > MAX_MESSAGE_BYTES:
        examples = f"{draft.sequence} tokens" if draft.images is None else f"{draft.images.size}² pixels"
        raise ManifestError(
            ManifestReason.CELL_TOO_LARGE,
            f"One micro-batch of {draft.batch} × {examples} needs tensors of more than 1 GiB.",
            "Use a smaller batch and more micro-batches.",
        )


def _check_optimizer(settings: OptimizerSettings) -> None:
    ranges = {
        "learning_rate": 0 < settings.learning_rate <= 10,
        "beta1": 0 <= settings.beta1 < 1,
        "beta2": 0 < settings.beta2 < 1,
        "eps": 0 < settings.eps <= 1,
        "weight_decay": 0 <= settings.weight_decay <= 10,
        "clip": 0 <= settings.clip <= 1e6,
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
    if draft.compression not in WIRE:
        raise ManifestError(
            ManifestReason.BAD_COMPRESSION,
            f"The compression {draft.compression!r} is not known.",
            f"Use {', '.join(WIRE)}.",
        )
    known = (FP32, BF16) if draft.images is None else (FP32,)
    if draft.precision not in known:
        raise ManifestError(
            ManifestReason.BAD_PRECISION,
            f"The precision {draft.precision!r} is not known{'' if draft.images is None else ' for images'}.",
            f"Use {' or '.join(known)}.",
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
