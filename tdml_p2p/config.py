"""Settings, each written once: field, default, help text; flags, environment and TOML keys follow from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PeerConfig:
    """One daemon."""

    home: Path | None = _option(None, "Home folder; the default is the platform's user data folder.")
    join: tuple[str, ...] = _option((), "Invite line of a network to join; may be repeated.")
    listen: tuple[str, ...] = _option((), "Address to listen on, as a multiaddr; may be repeated.")
    device: str = _option("auto", "auto or cpu; accelerators are not supported yet.")
    threads: int = _option(1, "CPU threads for torch.")
    memory: int = _option(0, "Bytes that all seats of this peer may take, weights and states too; 0 sets no bound.")
    grace: int = _option(1800, "Seconds for which a seat is kept for a client that is silent.")
    recompute: bool = _option(False, "Keep no activations of cells under way: less memory, a third more computing.")
    work: bool = _option(True, "Serve stages of open tasks.")
    validate: bool = _option(True, "Validate blocks when bonded.")
    trust: str = _option("", "HEIGHT:HASH of a block that you trust; a chain with another block there is refused.")
    keep: int = _option(0, "Newest blocks that are kept, 1000 or more; 0 keeps all.")
    snapshot: bool = _option(False, "Fetch a verified snapshot of the chain's state instead of every block.")
    status_port: int = _option(0, "Port of the status page on 127.0.0.1; 0 takes a free one, -1 turns it off.")
    public_name: str = _option("", "Name shown to others.")
    log_level: str = _option("info", "debug, info, warning or error.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: str = _option("llama-tiny", "Built-in name, folder or config file.")
    data: tuple[Path, ...] = _option((), "Text, JSON lines or parquet files, folders of them, saved data sets; digits.")
    text_field: str = _option("text", "Field or column that holds the text in JSON lines and tables.")
    max_data: int = _option(0, "Bytes of text read from each path; 0 reads what the run can use.")
    validation: str = _option("", "Share of the text, or a path, that is never trained on but measured.")
    eval_every: int = _option(50, "Steps between validations; 0 validates never.")
    out: Path = _option(Path("out"), "Folder for the model.")
    steps: int = _option(100, "Optimiser steps.")
    batch: int = _option(8, "Sequences, or images, of a micro-batch.")
    microbatches: int = _option(8, "Micro-batches of a step.")
    sequence: int = _option(128, "Tokens of a sequence.")
    image_size: int = _option(0, "Pixels of an image's side; 0 is the model's usual size.")
    stages: int = _option(2, "Pipeline stages.")
    replicas: int = _option(2, "Replicas of each stage.")
    learning_rate: float = _option(1e-3, "Peak learning rate.")
    clip: float = _option(1.0, "Norm that the whole model's gradient is scaled down to; 0 never.")
    seed: int = _option(0, "Seed of weights and data order.")
    precision: str = _option("fp32", "Arithmetic of matrix products: fp32, or bf16 on peers of one kernel class.")
    kernel: str = _option("", "Kernel class of the workers under bf16; the default is this machine's with one thread.")
    compress: str = _option("none", "Compression between workers: none, bf16 or int8.")
    audit_rate: float = _option(0.1, "Share of cells that are audited.")
    redundancy: int = _option(1, "Replicas that compute every cell: 1, 3, 5 or 7; what most of them have goes on.")
    lora: int | None = _option(None, "Train low-rank adapters of this rank beside the model's weights, which stay.")
    lora_alpha: int = _option(0, "What adapters are scaled by, over their rank; 0 is the rank.")
    lora_targets: tuple[str, ...] = _option((), "Modules that get adapters, such as q_proj, or all-linear.")
    lora_dropout: float = _option(0.0, "Share of an adapter's input that is dropped in training.")
    private: bool = _option(False, "Keep embedding, head, tokens and labels on this machine.")
    private_layers: int = _option(0, "Decoder layers that a private run keeps here beside embedding and head each.")
    price: int = _option(1, "Base units paid per cell.")
    save_every: int = _option(50, "Steps between checkpoints of verified states; 0 saves at the end only.")
    trace: Path | None = _option(None, "File for a trace of every peer's work, which Perfetto opens.")
    resume: bool = _option(False, "Continue the run saved in the out folder.")
