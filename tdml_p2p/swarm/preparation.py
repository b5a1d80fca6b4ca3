"""Everything of a training run that needs no network: model, tokenizer, data and manifest, or an error."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import USAGE, UserError
from trainer.checkpoint import Checkpoint, resume
from trainer.data import MAX_CORPUS_BYTES, Batches, Corpus, load_batches, read_corpus
from trainer.errors import TrainerError
from trainer.manifest import AuditSettings, OptimizerSettings, TaskManifest, complete
from trainer.presets import preset_of
from trainer.tokens import Tokenizer, byte_tokenizer, open_tokenizer, train_tokenizer

_LEAST_BYTES = 4 << 20
_TOKEN_BYTES = 16
DEPTH = 16
"""Steps that may be unsettled at once: an audit settles six to eight blocks after its step."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be posted; `checkpoint` is what it resumes from."""

    manifest: TaskManifest
    batches: Batches
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None


def prepare(train: TrainConfig) -> Prepared:
    """Return the run that the settings describe; raise `UserError`."""
    _refuse_unsupported(train)
    try:
        if train.resume:
            checkpoint = resume(train.out)
            corpus = read_data(train.data, checkpoint.manifest.tokens_per_step * checkpoint.manifest.steps)
            batches = load_batches(corpus, checkpoint.tokenizer, checkpoint.manifest)
            return Prepared(checkpoint.manifest, batches, checkpoint.tokenizer, checkpoint)
        corpus = read_data(train.data, train.batch * train.microbatches * train.sequence * train.steps)
        family, config, folder = model_of(train.model)
        tokenizer = _tokenizer(folder, corpus, config)
        manifest = complete(_draft(train, family, config, tokenizer))
        return Prepared(manifest, load_batches(corpus, tokenizer, manifest), tokenizer, None)
    except TrainerError as error:
        raise UserError(error.sentence, error.hint) from None


def read_data(paths: tuple[Path, ...], tokens: int) -> Corpus:
    """Return the text of all `paths` as one corpus, at least enough for `tokens`; raise `UserError` or `DataError`.

    Reading more than the run can see would only cost time: a token is rarely more than 16 bytes.
    """
    if not paths:
        raise UserError("There is no data to train on.", "give a text file or folder with --data", USAGE)
    limit = min(MAX_CORPUS_BYTES, max(_LEAST_BYTES, _TOKEN_BYTES * tokens))
    parts = [read_corpus(path, limit) for path in paths]
    return Corpus(tuple(text for part in parts for text in part.texts), sum(part.bytes for part in parts))


def model_of(name: str) -> tuple[str, dict[str, Any], Path | None]:
    """Return family, config and, for a model folder, the folder; raise `UserError` or `ManifestError`."""
    path = Path(name)
    if not path.exists():
        preset = preset_of(name)
        return preset.family, dict(preset.config), None
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
        family = config["model_type"]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", "give a model folder or a config file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a model config.", "it must be JSON with a model_type") from None
    if path.is_dir() and any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} holds weights, and training on from weights is not supported yet.",
            "give its config.json to train the same architecture from scratch",
        )
    plain = {key: value for key, value in config.items() if isinstance(value, (int, float, bool, str))}
    return str(family), plain, path if path.is_dir() else None


def _tokenizer(folder: Path | None, corpus: Corpus, config: dict[str, Any]) -> Tokenizer:
    if folder is not None and (folder / "tokenizer.json").exists():
        return open_tokenizer(folder)
    vocabulary = int(config.get("vocab_size", 0))
    if vocabulary <= 512:
        return byte_tokenizer()
    return train_tokenizer(corpus.texts, vocabulary)


def _draft(train: TrainConfig, family: str, config: dict[str, Any], tokenizer: Tokenizer) -> TaskManifest:
    return TaskManifest(
        family=family,
        config=config,
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
    }
    for flag, is_set in wanted.items():
        if is_set:
            raise UserError(f"{flag} is not supported yet.", "leave the flag out", USAGE)
    if train.out.exists() and not train.out.is_dir():
        raise UserError(f"{train.out} is not a folder.", "choose another folder with --out", USAGE)
