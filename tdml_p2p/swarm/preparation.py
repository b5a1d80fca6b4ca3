"""Everything of a training run that needs no network: model, tokenizer, data and manifest, or an error."""

import os
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import FAILED, USAGE, UserError
from tdml_p2p.swarm.journal import Journal, read_journal
from trainer.adapted_run import FrozenModel, adapters_on, frozen_again, lora_wish
from trainer.checkpoint import Checkpoint, refuse_occupied, resume, starting_from
from trainer.data import Batches, Corpus, HeldBack, RunData, Validation, split_off, validation_of
from trainer.ends import drawn_ends, keeping
from trainer.errors import CheckpointError, CheckpointReason, DataError, DataReason, TrainerError
from trainer.footprint import DEPTH, depth_of
from trainer.image_run import ImageRun, ImageSource, begin, go_on, takes_images
from trainer.manifest import AuditSettings, OptimizerSettings, TaskManifest, complete
from trainer.precision import FP32
from trainer.pretrained import Pretrained, model_of, starting_states
from trainer.readers import Reader
from trainer.state import StageState
from trainer.token_file import tokenized
from trainer.tokens import Tokenizer, tokenizer_for

_LEAST_BYTES = 4 << 20
_TOKEN_BYTES = 16
_CACHE = ".tokens"


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be posted; `checkpoint` is what it resumes from.

    `states` are those that the client holds, one a stage, all of one step; none for a run from the seed.
    `validation` is what the run is measured on, `frozen` the weights under adapters. `ends` are the client's
    own two stages before the first step of a private run from the seed. `kernel` is the kernel class in which results
    are exact, empty where they are comparable between all.
    """

    manifest: TaskManifest
    batches: RunData
    tokenizer: Reader
    checkpoint: Checkpoint | None = None
    states: tuple[StageState, ...] = ()
    validation: HeldBack | None = None
    frozen: FrozenModel | None = None
    ends: tuple[StageState, ...] = ()
    kernel: bytes = b""

    def given(self, step: int, stage: int) -> StageState | None:
        """Return the state of a stage after `step` that the client holds from the beginning, if it is one."""
        ends = dict(zip((0, self.manifest.stages - 1), self.ends, strict=False))
        state = self.states[stage] if self.states else ends.get(stage)
        return state if state is not None and state.step == step else None

    def over_rest_of(self, checkpoint: Checkpoint) -> "Prepared":
        """Return the run over the steps that are left after `checkpoint`."""
        manifest, states = checkpoint.rest()
        batches = self.batches.continued(manifest)
        return replace(self, manifest=manifest, batches=batches, checkpoint=checkpoint, states=states, ends=())


def prepare(train: TrainConfig) -> Prepared:
    """Return the run that the settings describe; raise `UserError`."""
    _refuse_unsupported(train)
    try:
        prepared = _resumed(train) if train.resume else _begun(train)
        return replace(prepared, kernel=_kernel(train.kernel, prepared.manifest.precision))
    except TrainerError as error:
        code = FAILED if error.reason in (DataReason.DISK, CheckpointReason.DISK) else USAGE
        raise UserError(error.sentence, error.hint or "see tdml-peer train --help", code) from None


def _kernel(wanted: str, precision: str) -> bytes:
    """Return the kernel class of the workers: the one that is wanted, or this machine's with one thread."""
    if precision == FP32:
        if wanted:
            raise UserError("--kernel is of runs in bf16 only.", "leave it out, or give --precision bf16", USAGE)
        return b""
    if not wanted:
        from trainer.kernel import kernel_class

        return kernel_class(precision, threads=1)
    if re.fullmatch("[0-9a-f]{64}", wanted) is None:
        hint = "64 hexadecimal digits, which a peer's status names where it does not apply"
        raise UserError(f"{wanted[:80]!r} is no kernel class.", hint, USAGE)
    return bytes.fromhex(wanted)


def _resumed(train: TrainConfig) -> Prepared:
    try:
        checkpoint = resume(train.out)
    except CheckpointError as error:
        journal = read_journal(train.out)
        if error.reason is not CheckpointReason.MISSING or journal is None:
            raise
        return _begun_again(train, journal)
    manifest, tokenizer = checkpoint.manifest, checkpoint.tokenizer
    if train.private and not manifest.private:
        raise UserError(
            f"The run in {train.out} is not private.", "start a private one in another folder, or leave out --private"
        )
    if manifest.images is not None:
        return _on_images(go_on(checkpoint, _image_source(train)), checkpoint)
    assert isinstance(tokenizer, Tokenizer)  # it was opened for a task on text
    frozen = frozen_again(checkpoint, train.model)
    corpus = corpus_of(train, train.data, manifest.tokens_per_step * manifest.total_steps)
    batches, validation = _load(train, corpus, tokenizer, manifest)
    if checkpoint.data and (checkpoint.data, checkpoint.tokens) != (batches.data, batches.tokens):
        raise DataError(
            DataReason.CHANGED,
            f"The data is not what the run in {train.out} was trained on until step {checkpoint.step}.",
            "Give the same --data, --validation, --max-data and --text-field as at its start, or start a new run.",
        )
    return Prepared(manifest, batches, tokenizer, checkpoint, checkpoint.states, validation, frozen)


def _begun_again(train: TrainConfig, journal: Journal) -> Prepared:
    """Return the run that was killed before it saved anything; raise `UserError` unless the settings are its own."""
    prepared = _begun(train)
    if prepared.manifest.address.hex() != journal.manifest:
        raise UserError(
            f"The run in {train.out} was ended before anything was saved, and these settings are not its own.",
            "give the flags that it was started with, or choose another folder with --out",
            USAGE,
        )
    return prepared


def _begun(train: TrainConfig) -> Prepared:
    refuse_occupied(train.out)
    wish = lora_wish(train.lora, train.lora_alpha, train.lora_targets, train.lora_dropout)
    model = model_of(train.model)
    if takes_images(model, wish) and train.data:
        return _on_images(begin(model, _draft(train, model), _image_source(train)))
    corpus = corpus_of(train, train.data, train.batch * train.microbatches * train.sequence * train.steps)
    tokenizer = tokenizer_for(model.tokenizer, int(model.config.get("vocab_size", 0)), corpus.texts())
    lora, frozen = adapters_on(model, wish)
    manifest = complete(msgspec.structs.replace(_draft(train, model), tokenizer=tokenizer.name, lora=lora))
    if train.private_layers:
        manifest = keeping(manifest, train.private_layers)
    audit = msgspec.structs.replace(manifest.audit, depth=depth_of(manifest))
    manifest = msgspec.structs.replace(manifest, audit=audit)
    if tokenizer.vocabulary > manifest.vocabulary:
        raise DataError(
            DataReason.VOCABULARY,
            f"The tokenizer has {tokenizer.vocabulary} ids, the model a vocabulary of {manifest.vocabulary}.",
            "Use the tokenizer that belongs to the model, or a model with a larger vocabulary.",
        )
    states = starting_states(model, manifest) if model.weights and frozen is None else ()
    manifest = starting_from(manifest, states)
    batches, validation = _load(train, corpus, tokenizer, manifest)
    ends = drawn_ends(manifest, secrets.randbits(63)) if train.private and not states else ()
    return Prepared(manifest, batches, tokenizer, states=states, validation=validation, frozen=frozen, ends=ends)


def _load(
    train: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, manifest: TaskManifest
) -> tuple[Batches, Validation | None]:
    """Return what a run is trained on and what it is measured on, tokenised into the out folder."""
    other = _validation_path(train)
    make_out(train.out)
    cache = train.out / _CACHE
    found = tokenized(corpus, tokenizer, cache)
    if other is None and train.validation:
        return split_off(found, float(train.validation), manifest)
    batches = Batches(found.ids, manifest, found.data, found.highest)
    if other is None:
        return batches, None
    kept = tokenized(corpus_of(train, (other,), manifest.tokens_per_step), tokenizer, cache)
    return batches, validation_of(kept.ids, manifest)


def _image_source(train: TrainConfig) -> ImageSource:
    if train.max_data or train.text_field != TrainConfig.text_field:
        raise UserError("--max-data and --text-field are for text.", "leave them out to train on images", USAGE)
    other = _validation_path(train)
    make_out(train.out)
    share = float(train.validation or 0) if other is None else 0.0
    return ImageSource(train.data, train.out, share, other, train.image_size)


def _on_images(run: ImageRun, checkpoint: Checkpoint | None = None) -> Prepared:
    return Prepared(run.manifest, run.batches, run.classes, checkpoint, run.states, run.validation)


def _validation_path(train: TrainConfig) -> Path | None:
    """Return the path that --validation names, if it is no share; raise `DataError` if it is trained on."""
    try:
        float(train.validation or 0)
    except ValueError:
        path = Path(train.validation)
    else:
        return None
    real = path.resolve()
    for data in (data.resolve() for data in train.data):
        if real.is_relative_to(data) or data.is_relative_to(real):
            raise DataError(
                DataReason.OVERLAP,
                f"The text to validate on, {path}, is among the text to train on.",
                "Move it out of the --data paths, or give a share such as --validation 0.05.",
            )
    return path


def make_out(out: Path) -> None:
    """Make the folder for the model; raise `UserError` while nothing has been trained in vain."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be made: {error.strerror}.", "choose another with --out") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"The folder {out} is not writable.", "make it yours with chown, or choose another with --out")


def corpus_of(train: TrainConfig, paths: tuple[Path, ...], tokens: int) -> Corpus:
    """Return the text below `paths`, at least enough for `tokens`; raise `UserError`.

    Reading more than the run can see would only cost time: a token is rarely more than 16 bytes.
    """
    if not paths:
        raise UserError("There is no data to train on.", "give a text file or folder with --data", USAGE)
    return Corpus(paths, train.text_field, train.max_data or max(_LEAST_BYTES, _TOKEN_BYTES * tokens))


def _draft(train: TrainConfig, model: Pretrained) -> TaskManifest:
    return TaskManifest(
        family=model.family,
        config=model.config,
        seed=train.seed,
        stages=train.stages + 2 * train.private,
        private=train.private,
        replicas=train.replicas,
        optimizer=OptimizerSettings(
            learning_rate=train.learning_rate, clip=train.clip, warmup_steps=min(10, train.steps // 4)
        ),
        batch=train.batch,
        microbatches=train.microbatches,
        sequence=train.sequence,
        steps=train.steps,
        precision=train.precision,
        compression=train.compress,
        audit=AuditSettings(rate=round(train.audit_rate * 10_000), depth=DEPTH, redundancy=train.redundancy),
    )


def _refuse_unsupported(train: TrainConfig) -> None:
    if not 0 <= train.audit_rate <= 1:
        raise UserError(f"--audit-rate cannot be {train.audit_rate}.", "it is a share, from 0 to 1", USAGE)
    if train.private_layers and not train.private:
        raise UserError("--private-layers is of private runs only.", "give --private, or leave it out", USAGE)
    if train.price < 0:
        raise UserError("--price cannot be negative.", "it is in base units for a cell", USAGE)
    if train.max_data < 0 or train.eval_every < 0:
        raise UserError("--max-data and --eval-every cannot be negative.", "0 is their usual meaning", USAGE)
    if train.save_every < 0:
        raise UserError("--save-every cannot be negative.", "0 saves at the end only", USAGE)
    if train.trace is not None and not _may_write(train.trace):
        raise UserError(f"{train.trace} cannot be written.", "choose another file with --trace", USAGE)
    if train.out.exists() and not train.out.is_dir():
        raise UserError(f"{train.out} is not a folder.", "choose another folder with --out", USAGE)


def _may_write(path: Path) -> bool:
    """Whether a file can be written there, in folders yet to be made if need be; an old one is left as it is."""
    if path.exists():
        return path.is_file() and os.access(path, os.W_OK)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK)
