"""Named refusals of the trainer: each error carries the reason (a stable word), a sentence and a hint."""

from enum import StrEnum


class ManifestReason(StrEnum):
    """Why a task manifest is refused."""

    UNREADABLE = "unreadable-manifest"
    NOT_CANONICAL = "not-canonical"
    TOO_LARGE = "manifest-too-large"
    UNKNOWN_VERSION = "unknown-version"
    UNKNOWN_FAMILY = "unknown-family"
    UNKNOWN_PRESET = "unknown-preset"
    UNKNOWN_SETTING = "unknown-setting"
    BAD_CONFIG = "bad-config"
    TOO_MANY_STAGES = "too-many-stages"
    BAD_CUTS = "bad-cuts"
    BAD_SIZE = "bad-size"
    SEQUENCE_TOO_LONG = "sequence-too-long"
    CELL_TOO_LARGE = "cell-too-large"
    STAGE_TOO_LARGE = "stage-too-large"
    BAD_OPTIMIZER = "bad-optimizer"
    BAD_PRECISION = "bad-precision"
    BAD_COMPRESSION = "bad-compression"
    BAD_ADDRESS = "bad-address"
    BAD_START = "bad-start"
    BAD_ADAPTERS = "bad-adapters"
    UNKNOWN_TARGET = "unknown-target"
    NOT_PRIVATE = "cannot-be-private"
    BAD_IMAGES = "bad-images"
    BAD_REDUNDANCY = "bad-redundancy"


class DataReason(StrEnum):
    """Why training data is refused."""

    MISSING = "data-missing"
    UNREADABLE = "data-unreadable"
    NOT_TEXT = "data-not-text"
    EMPTY = "data-empty"
    TOO_SHORT = "data-too-short"
    VOCABULARY = "vocabulary-too-small"
    FIELD = "field-missing"
    LIBRARY = "library-missing"
    CHANGED = "data-changed"
    OVERLAP = "validation-overlaps"
    BAD_SPLIT = "bad-split"
    DISK = "data-disk"
    NOT_IMAGE = "data-not-images"
    IMAGE_SIZE = "wrong-image-size"
    UNKNOWN_CLASS = "unknown-class"
    LABEL = "label-out-of-range"


class StageReason(StrEnum):
    """Why a stage refuses a call."""

    BAD_SHAPE = "bad-shape"
    BAD_TYPE = "bad-type"
    BAD_TOKEN = "bad-token"
    UNKNOWN_CELL = "unknown-cell"
    REPEATED_CELL = "repeated-cell"
    WRONG_STATE = "wrong-state"
    NOT_FINITE = "not-finite"


class CheckpointReason(StrEnum):
    """Why a checkpoint can be neither written nor opened."""

    MISSING = "checkpoint-missing"
    DAMAGED = "checkpoint-damaged"
    DISK = "disk-full"
    OCCUPIED = "folder-of-another-run"
    APART = "tied-copies-differ"
    OTHER_BASE = "base-model-differs"


class ModelReason(StrEnum):
    """Why a model folder cannot be trained on from."""

    UNREADABLE = "model-unreadable"
    NOT_SAFETENSORS = "weights-not-safetensors"
    NO_TOKENIZER = "tokenizer-missing"
    WRONG_TENSORS = "weights-do-not-fit"
    NO_WEIGHTS = "weights-missing"


class TrainerError(ValueError):
    """Base of the trainer's refusals: `reason` (a word), `sentence` (for people) and `hint` (what to do)."""

    def __init__(self, reason: StrEnum, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence
        self.hint = hint


class ManifestError(TrainerError):
    """A manifest, model config or preset that cannot be trained."""


class DataError(TrainerError):
    """Training data that cannot be used."""


class StageError(TrainerError):
    """A call that a stage refuses."""


class ModelError(TrainerError):
    """A model config or folder that cannot be read, or weights that do not fit."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written or opened."""
