"""Everything of a training run that needs no network: model, tokenizer, data and manifest, or an error."""

import os
from dataclasses import dataclass
from pathlib import Path

from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import USAGE, UserError
from trainer.checkpoint import Checkpoint, resume, starting_from
from trainer.data import MAX_CORPUS_BYTES, Batches, Corpus, load_batches, read_corpus
from trainer.errors import TrainerError
from trainer.manifest import AuditSettings, OptimizerSettings, TaskManifest, complete
from trainer.presets import preset_of
from trainer.pretrained import Pretrained, read_pretrained, starting_states
from trainer.state import StageState
from trainer.tokens import Tokenizer, byte_tokenizer, open_tokenizer, train_tokenizer

_LEAST_BYTES = 4 << 20
_TOKEN_BYTES = 16
DEPTH = 16
"""Steps that may be unsettled at once: an audit settles six to eight blocks after its step."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be posted; `checkpoint` is what it resumes from.

    `states` are those that the client holds, one a stage, all of one step; none for a run from the seed.
    """

    manifest: TaskManifest
    batches: Batches
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None = None
    states: tuple[StageState, ...] = ()

    def over_rest_of(self, checkpoint: Checkpoint) -> "Prepared":
        """Return the run over the steps that are left after `checkpoint`."""
        manifest, states = checkpoint.rest()
        return Prepared(manifest, self.batches.continued(manifest), self.tokenizer, checkpoint, states)


def prepare(train: TrainConfig) -> Prepared:
    """Return the run that the settings describe; raise `UserError`."""
    _refuse_unsupported(train)
    try:
        if train.resume:
            checkpoint = resume(train.out)
            manifest = checkpoint.manifest
            corpus = read_data(train.data, manifest.tokens_per_step * manifest.total_steps)
            batches = load_batches(corpus, checkpoint.tokenizer, manifest)
            return Prepared(manifest, batches, checkpoint.tokenizer, checkpoint, checkpoint.states)
        corpus = read_data(train.data, train.batch * train.microbatches * train.sequence * train.steps)
        model = model_of(train.model)
        tokenizer = _tokenizer(model, corpus)
        manifest = complete(_draft(train, model, tokenizer))
        states = starting_states(model, manifest) if model.weights else ()
        manifest = starting_from(manifest, states)
        return Prepared(manifest, load_batches(corpus, tokenizer, manifest), tokenizer, states=states)
    except TrainerError as error:
        raise UserError(error.sentence, error.hint or "see tdml-peer train --help") from None


def make_out(out: Path) -> None:
    """Make the folder for the model; raise `UserError` while nothing has been trained in vain."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be made: {error.strerror}.", "choose another with --out") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"The folder {out} is not writable.", "make it yours with chown, or choose another with --out")


def read_data(paths: tuple[Path, ...], tokens: int) -> Corpus:
    """Return the text of all `paths` as one corpus, at least enough for `tokens`; raise `UserError` or `DataError`.

    Reading more than the run can see would only cost time: a token is rarely more than 16 bytes.
    """
    if not paths:
        raise UserError("There is no data to train on.", "give a text file or folder with --data", USAGE)
    limit = min(MAX_CORPUS_BYTES, max(_LEAST_BYTES, _TOKEN_BYTES * tokens))
    parts = [read_corpus(path, limit) for path in paths]
    return Corpus(tuple(text for part in parts for text in part.texts), sum(part.bytes for part in parts))


def model_of(name: str) -> Pretrained:
    """Return the model that --model names: a folder, a config file or a built-in name; raise `TrainerError`."""
    path = Path(name)
    if path.exists():
        return read_pretrained(path)
    preset = preset_of(name)
    return Pretrained(preset.family, dict(preset.config))


def _tokenizer(model: Pretrained, corpus: Corpus) -> Tokenizer:
    if model.tokenizer is not None:
        return open_tokenizer(model.tokenizer)
    vocabulary = int(model.config.get("vocab_size", 0))
    if vocabulary <= 512:
        return byte_tokenizer()
    return train_tokenizer(corpus.texts, vocabulary)


def _draft(train: TrainConfig, model: Pretrained, tokenizer: Tokenizer) -> TaskManifest:
    return TaskManifest(
        family=model.family,
        config=model.config,
        seed=train.seed,
        tokenizer=tokenizer.name,
        stages=train.stages,
        replicas=train.replicas,
        optimizer=OptimizerSettings(learning_rate=train.learning_rate, warmup_steps=min(10, train.steps // 4)),
        batch=train.batch,
        microbatches=train.microbatches,
        sequence=train.sequence,
        steps=train.steps,
        precision=train.precision,
        audit=AuditSettings(rate=round(train.audit_rate * 10_000), depth=DEPTH, redundancy=train.redundancy),
    )


def _refuse_unsupported(train: TrainConfig) -> None:
    wanted = {
        "--lora": train.lora,
        "--private": train.private,
        "--redundancy": train.redundancy != 1,
        "--compress": train.compress != "none",
        "--precision": train.precision != "fp32",
    }
    for flag, is_set in wanted.items():
        if is_set:
            raise UserError(f"{flag} is not supported yet.", "leave the flag out, its default is supported", USAGE)
    if not 0 <= train.audit_rate <= 1:
        raise UserError(f"--audit-rate cannot be {train.audit_rate}.", "it is a share, from 0 to 1", USAGE)
    if train.price < 0:
        raise UserError("--price cannot be negative.", "it is in base units for a cell", USAGE)
    if train.save_every < 0:
        raise UserError("--save-every cannot be negative.", "0 saves at the end only", USAGE)
    if train.out.exists() and not train.out.is_dir():
        raise UserError(f"{train.out} is not a folder.", "choose another folder with --out", USAGE)
