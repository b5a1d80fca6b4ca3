"""A run on this machine in a few lines: the same manifest, data order and checkpoints as a swarm's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from trainer.adapted_run import FrozenModel, adapters_on, frozen_again, lora_wish
from trainer.base_weights import StageBase
from trainer.checkpoint import Checkpoint, refuse_occupied, resume, save, starting_from
from trainer.data import Batches, Corpus, HeldBack, RunData, Validation, split_off
from trainer.errors import DataError, DataReason
from trainer.generate import generate
from trainer.image_run import ImageRun, ImageSource, begin, go_on, takes_images
from trainer.local import LocalStep, LocalTrainer, whole
from trainer.manifest import OptimizerSettings, TaskManifest, complete
from trainer.metrics import MetricsLog
from trainer.optimizer import learning_rate
from trainer.pretrained import Pretrained, model_of, starting_states
from trainer.stage import stage_layout
from trainer.state import StageState, initial_state
from trainer.token_file import tokenized
from trainer.tokens import Tokenizer, tokenizer_for

_CACHE = ".tokens"
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunSettings:
    """What a run on this machine is like; the names are those of `tdml-peer train`."""

    steps: int = 100
    batch: int = 8
    microbatches: int = 1
    sequence: int = 128
    image_size: int = 0
    learning_rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    text_field: str = "text"
    max_data: int = 0
    validation: float = 0.0
    lora: int | None = None
    lora_alpha: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0


class LocalRun:
    """A run on this machine: iterate over it to train, one `LocalStep` each; stop and go on as you like.

    `out` holds the model, its metrics and the state to resume from, as a swarm's does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: RunData,
        validation: HeldBack | None,
        out: Path,
        base: StageBase | None = None,
    ) -> None:
        self.out = out
        self.validation = validation
        self._checkpoint = checkpoint
        self._trainer = LocalTrainer(checkpoint.manifest, batches, checkpoint.states[0], base)
        self._losses = dict(checkpoint.losses)
        self._measured = dict(checkpoint.validation)
        self._metrics = MetricsLog(out / _METRICS)

    @classmethod
    def create(
        cls, model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, settings: RunSettings
    ) -> "LocalRun":
        """Return a new run of a built-in model, config file or model folder; raise `TrainerError`."""
        found, folder = model_of(str(model)), Path(out)
        refuse_occupied(folder)
        wish = lora_wish(settings.lora, settings.lora_alpha, settings.lora_targets, settings.lora_dropout)
        if takes_images(found, wish):
            return cls._on_images(begin(found, _draft(found, settings), _images(data, settings, folder)), folder)
        corpus = _corpus(data, settings)
        tokenizer = tokenizer_for(found.tokenizer, int(found.config.get("vocab_size", 0)), corpus.texts())
        lora, frozen = adapters_on(found, wish)
        manifest = complete(msgspec.structs.replace(_draft(found, settings), tokenizer=tokenizer.name, lora=lora))
        states = starting_states(found, manifest) if found.weights and frozen is None else ()
        manifest = starting_from(manifest, states)
        start = Checkpoint(manifest, states or (initial_state(manifest, 0),), tokenizer)
        return cls._of(start, corpus, settings, folder, frozen)

    @classmethod
    def resume(
        cls, out: str | Path, data: str | Path | Sequence[str | Path], settings: RunSettings | None = None
    ) -> "LocalRun":
        """Return the run saved in `out`, be it a swarm's or one of this machine; raise `TrainerError`.

        Of `settings` only what concerns the data counts. Adapters go on on the model that they were trained on.
        """
        saved, settings, folder = resume(Path(out)), settings or RunSettings(), Path(out)
        uncut = Checkpoint(
            manifest=whole(saved.manifest),
            states=(joined(saved.manifest, saved.states),),
            tokenizer=saved.tokenizer,
            losses=saved.losses,
            data=saved.data,
            tokens=saved.tokens,
            validation=saved.validation,
        )
        if saved.manifest.images is not None:
            return cls._on_images(go_on(uncut, _images(data, settings, folder)), folder, uncut)
        return cls._of(uncut, _corpus(data, settings), settings, folder, frozen_again(saved))

    @classmethod
    def _on_images(cls, run: ImageRun, out: Path, start: Checkpoint | None = None) -> "LocalRun":
        if start is None:
            states = run.states or (initial_state(run.manifest, 0),)
            start = Checkpoint(run.manifest, states, run.classes)
        return cls(start, run.batches, run.validation, out)

    @classmethod
    def _of(
        cls, start: Checkpoint, corpus: Corpus, settings: RunSettings, out: Path, frozen: FrozenModel | None
    ) -> "LocalRun":
        assert isinstance(start.tokenizer, Tokenizer)  # it was opened for a task on text
        found = tokenized(corpus, start.tokenizer, out / _CACHE)
        validation: Validation | None = None
        if settings.validation:
            batches, validation = split_off(found, settings.validation, start.manifest)
        else:
            batches = Batches(found.ids, start.manifest, found.data, found.highest)
        if start.data and (start.data, start.tokens) != (batches.data, batches.tokens):
            raise DataError(
                DataReason.CHANGED,
                f"The data is not what the run in {out} was trained on.",
                "Give the same data and the same settings for it as at its start.",
            )
        if frozen is None:
            return cls(start, batches, validation, out)
        return cls(replace(start, base=str(frozen.folder)), batches, validation, out, frozen.base)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._checkpoint.manifest.start + self._trainer.state.step

    def __iter__(self) -> Iterator[LocalStep]:
        """Train the steps that are left, one at a time."""
        while self.step < self._checkpoint.manifest.total_steps:
            yield self.advance()

    def advance(self) -> LocalStep:
        """Do one step and write its line of metrics; raise `CheckpointError` if the disk is full."""
        done = self._trainer.advance()
        step, manifest = self.step, self._checkpoint.manifest
        self._losses[step] = done.loss
        line = {
            "loss": done.loss,
            "learning_rate": learning_rate(manifest.optimizer, step, manifest.total_steps),
            "tokens_per_second": manifest.tokens_per_step / max(done.seconds, 1e-9),
            "seconds": done.seconds,
        }
        self._metrics.append(step, line)
        return LocalStep(step, done.loss, done.seconds)

    def evaluate(self) -> float:
        """Return the loss on the part of the text that is never trained on; raise `DataError` without one."""
        if self.validation is None:
            raise DataError(
                DataReason.BAD_SPLIT,
                "The run keeps no text to validate on.",
                "Give a share with RunSettings(validation=0.05).",
            )
        self._measured[self.step] = loss = self._trainer.evaluate(self.validation)
        return loss

    def save(self) -> Path:
        """Write the model folder, which `transformers` opens, and return it; raise `CheckpointError`."""
        start = self._checkpoint
        checkpoint = Checkpoint(
            manifest=start.manifest,
            states=(self._trainer.state,),
            tokenizer=start.tokenizer,
            losses=tuple(sorted(self._losses.items())),
            data=self._trainer.data.data,
            tokens=self._trainer.data.tokens,
            validation=tuple(sorted(self._measured.items())),
            base=start.base,
        )
        save(checkpoint, self.out)
        return self.out

    def generate(self, prompt: str, tokens: int = 64, temperature: float = 0.8, seed: int = 0) -> str:
        """Return `prompt` continued by the model that was saved last; raise `CheckpointError`."""
        return generate(self.out, prompt, tokens, temperature, seed)


def joined(manifest: TaskManifest, states: Sequence[StageState]) -> StageState:
    """Return the state of the uncut model, weights and moments, from those of its stages."""
    layout = stage_layout(whole(manifest), 0)
    parts = []
    for name in ("weights", "m", "v"):
        vector = torch.empty(layout.total, dtype=torch.float32)
        places = {tensor.name: place for tensor, place in zip(layout.tensors, layout.ranges, strict=True)}
        for index, state in enumerate(states):
            cut = stage_layout(manifest, index)
            for tensor, (start, stop) in zip(cut.tensors, cut.ranges, strict=True):
                low, high = places[tensor.name]
                vector[low:high] = getattr(state, name)[start:stop]
        parts.append(vector)
    return StageState(states[0].step, *parts)


def _draft(model: Pretrained, settings: RunSettings) -> TaskManifest:
    return TaskManifest(
        family=model.family,
        config=model.config,
        seed=settings.seed,
        optimizer=OptimizerSettings(
            learning_rate=settings.learning_rate, clip=settings.clip, warmup_steps=min(10, settings.steps // 4)
        ),
        batch=settings.batch,
        microbatches=settings.microbatches,
        sequence=settings.sequence,
        steps=settings.steps,
    )


def _images(data: str | Path | Sequence[str | Path], settings: RunSettings, out: Path) -> ImageSource:
    paths = (data,) if isinstance(data, str | Path) else data
    return ImageSource(tuple(Path(path) for path in paths), out, settings.validation, None, settings.image_size)


def _corpus(data: str | Path | Sequence[str | Path], settings: RunSettings) -> Corpus:
    paths = (data,) if isinstance(data, str | Path) else data
    return Corpus(tuple(Path(path) for path in paths), settings.text_field, settings.max_data)
