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
    memory: int = _option(0, "Bytes that the tensors of a step may take; 0 sets the usual bound.")
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
    data: tuple[Path, ...] = _option((), "Text files or folders.")
    out: Path = _option(Path("out"), "Folder for the model.")
    steps: int = _option(100, "Optimiser steps.")
    batch: int = _option(8, "Sequences of a micro-batch.")
    microbatches: int = _option(8, "Micro-batches of a step.")
    sequence: int = _option(128, "Tokens of a sequence.")
    stages: int = _option(2, "Pipeline stages.")
    replicas: int = _option(2, "Replicas of each stage.")
    learning_rate: float = _option(1e-3, "Peak learning rate.")
    seed: int = _option(0, "Seed of weights and data order.")
    precision: str = _option("fp32", "Precision profile.")
    compress: str = _option("none", "Compression on the wire.")
    audit_rate: float = _option(0.1, "Share of cells that are audited.")
    redundancy: int = _option(1, "Replicas that compute every cell.")
    lora: bool = _option(False, "Train adapters only.")
    private: bool = _option(False, "Keep tokens and labels on this machine.")
    price: int = _option(1, "Base units paid per cell.")
    save_every: int = _option(50, "Steps between checkpoints of verified states; 0 saves at the end only.")
    resume: bool = _option(False, "Continue the run saved in the out folder.")
