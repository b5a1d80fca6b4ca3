"""Honest noise, many times: every two configurations of software and hardware compared, over sizes and moments.

Llamas of several sizes are trained a little; cells of their first steps, of later ones and of a loss spike are
re-executed in a process for each configuration: threads, oneDNN or MKL, instruction sets, MKL's modes, batch
splits. Every pair of results is compared twice, as in an audit: sketches, which may differ by τ, and whole tensors,
whose worst row may differ by a hundred times that. Prints a row for each size and moment, deviations as shares of
what is allowed, a line for each size, then one JSON line; the exit status is 1 if anything honest was a fault.

`--sizes 0.2M,1M` makes those sizes' part of all comparisons: the parts of several calls add up. As many processes
compute at once as there are cores. By arithmetic the 100M size takes 12 GB of memory (1.2 GB in each process that
computes, 0.4 GB in the others, 4 GB in this one) and 8 GB of disk below TMPDIR, which must not be in memory as well.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import safe_open
from safetensors.torch import save_file

from bench.numerics import (
    FP32,
    HONEST,
    STAGES,
    Cell,
    calibration_of,
    largest,
    record_cells,
    reexecute,
    run,
    split,
)
from chain.hashing import digest
from chain.params import Params
from chain.verdicts import deviations, is_match
from trainer.compare import compare
from trainer.data import Corpus, load_batches, standard_library
from trainer.local import train_locally
from trainer.manifest import OptimizerSettings, TaskManifest, complete, encode_manifest
from trainer.sketch import cell_sketch
from trainer.stage import CellResult
from trainer.state import StageState
from trainer.tokens import byte_tokenizer

CONFIGURATIONS: dict[str, dict[str, str]] = {
    **HONEST,
    "4 threads": {"THREADS": "4"},
    "oneDNN, AVX2, 2 threads": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "THREADS": "2"},
    "MKL, AVX2 products, 2 threads": {"PLAIN": "1", "MKL_CBWR": "AVX2", "THREADS": "2"},
    "MKL, SSE4.2, batch split": {"PLAIN": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "SPLIT": "1"},
}
_PARAMS = Params()
_AT_ONCE = os.cpu_count() or 1


@dataclass(frozen=True)
class Size:
    """A model's width, layers, feed-forward width and heads; how long it is trained, how much of all cells it is."""

    hidden: int
    layers: int
    inner: int
    heads: int
    later: int
    share: float


SIZES = {
    "0.2M": Size(64, 3, 176, 4, 60, 0.74),
    "1M": Size(128, 4, 352, 4, 40, 0.22),
    "8M": Size(320, 6, 864, 5, 20, 0.03),
    "30M": Size(576, 7, 1536, 9, 6, 0.006),
    "100M": Size(832, 12, 2240, 13, 3, 0.002),
}

MOMENTS = ("early", "late", "spike")


@dataclass
class Row:
    """What was found at one moment of a model's training: worst deviations in whole tensors and in sketches."""

    size: str
    moment: str
    loss: float = 0.0
    cells: int = 0
    comparisons: int = 0
    faults: int = 0
    whole: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    sketched: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


class Machines:
    """One process for each configuration, which executes the cells in a folder when told to."""

    def __init__(self, stack: ExitStack) -> None:
        path = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "bench.noise", "--serve"]
        self._processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**os.environ, **wishes, "PYTHONPATH": path},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for wishes in CONFIGURATIONS.values()
        ]
        for process in self._processes:  # their end is the end of what they read
            assert process.stdin is not None
            stack.callback(process.stdin.close)

    def execute(self, folder: Path) -> list[Path]:
        """Return the files with each configuration's results of the cells in `folder`."""
        names = [f"results{index}.safetensors" for index in range(len(self._processes))]
        told = list(zip(self._processes, names, strict=True))
        for start in range(0, len(told), _AT_ONCE):
            for process, name in told[start : start + _AT_ONCE]:
                assert process.stdin is not None
                process.stdin.write(json.dumps([str(folder), name]) + "\n")
                process.stdin.flush()
            for process, _ in told[start : start + _AT_ONCE]:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError("a configuration ended before its cells were executed")
        return [folder / name for name in names]


def serve() -> None:
    """Execute cells as the environment says, a folder a line, until there are no more."""
    for line in sys.stdin:
        folder, name = json.loads(line)
        reexecute(Path(folder), name)
        print("done", flush=True)


def manifest_of(size: Size) -> TaskManifest:
    """Return the manifest of a model of this size, cut into three stages."""
    config: dict[str, int | float | bool | str] = {
        "vocab_size": 512,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.inner,
        "num_attention_heads": size.heads,
    }
    first = max(1, size.layers // 3)
    cuts = (first, size.layers - 2 * first, first)
    settings = OptimizerSettings(learning_rate=6e-4, warmup_steps=5)
    shape: dict[str, Any] = {"stages": STAGES, "cuts": cuts, "batch": 2, "microbatches": 2, "sequence": 64}
    return complete(TaskManifest("llama", config, optimizer=settings, **shape))


def moments(manifest: TaskManifest, data: Any, later: int) -> Iterator[tuple[str, StageState]]:
    """Yield states of a training: after its first step, later, and after a step so long that the loss leaps."""
    early = train_locally(manifest, data, 1)
    yield MOMENTS[0], early
    after = train_locally(manifest, data, later, state=early)
    yield MOMENTS[1], after
    wild = replace(manifest, optimizer=OptimizerSettings(learning_rate=1.0, warmup_steps=1))
    yield MOMENTS[2], train_locally(wild, data, later + 1, state=after)


def measure(wanted: int, names: list[str]) -> Iterator[Row]:
    """Yield a row for each moment of these sizes: their part of about so many comparisons of all sizes."""
    pairs = (len(CONFIGURATIONS) + 1) * len(CONFIGURATIONS) // 2
    total = sum(size.share for size in SIZES.values())
    with ExitStack() as stack:
        machines = Machines(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in names:
            size = SIZES[name]
            manifest = manifest_of(size)
            data = load_batches(Corpus((standard_library(),), limit=1 << 20), byte_tokenizer(), manifest)
            (folder / "manifest.json").write_bytes(encode_manifest(manifest))
            batches = max(1, round(wanted * size.share / total / pairs / STAGES / 3))
            for moment, state in moments(manifest, data, size.later):
                row = Row(name, moment)
                for number in range(batches):
                    tokens, labels = data.batch(size.later + 2 + number // 2, number % 2)
                    batch = {"tokens": tokens.contiguous(), "labels": labels.contiguous()}
                    save_file(batch, folder / "batch.safetensors")
                    states = split(manifest, state)
                    compare_all(row, manifest, states, record_cells(folder, manifest, states), machines.execute(folder))
                row.loss /= batches
                yield row


def compare_all(
    row: Row, manifest: TaskManifest, states: list[torch.Tensor], cells: list[Cell], files: list[Path]
) -> None:
    """Add to `row` what every two results of a micro-batch's cells differ by."""
    for index in range(STAGES):
        results = [run(manifest, states, cells, index), *(_read(file, index) for file in files)]
        key = digest("noise", row.size.encode(), row.moment.encode(), row.cells.to_bytes(8, "big"))
        sketches = [cell_sketch(one.y, one.gx, one.gw, key) for one in results]
        if index == STAGES - 1:
            row.loss += float(results[0].y.mean())
        row.cells += 1
        for one, other in itertools.combinations(range(len(results)), 2):
            found = compare(results[one], results[other], FP32)
            short = deviations(sketches[one], sketches[other])
            row.comparisons += 1
            row.faults += found.is_fraud or not is_match(short, _PARAMS)
            row.whole = largest([row.whole, [found.y, found.gx, found.gw]])
            row.sketched = largest([row.sketched, list(short)])


def _read(file: Path, index: int) -> CellResult:
    with safe_open(file, "pt") as held:
        y, gx, gw = (held.get_tensor(f"{name}{index}") for name in ("y", "gx", "gw"))
    return CellResult(y, gx, gw, ())


def show(row: Row) -> None:
    """Print a row: the share of τ that sketches need, of a hundred τ that whole tensors do."""
    tau = (FP32.y, FP32.gx, FP32.gw)
    shares = [worst / limit for worst, limit in zip(row.sketched, tau, strict=True)]
    shares += [worst / limit / FP32.fraud_factor for worst, limit in zip(row.whole, tau, strict=True)]
    counts = f"{row.cells:6} cells {row.comparisons:7} comparisons {row.faults} faults"
    print(f"{row.size:>5} {row.moment:6} loss {row.loss:6.2f} {counts}", *(f"{one:7.4f}" for one in shares), flush=True)


def made(rows: list[Row], size: str = "") -> int:
    """Return how many comparisons were made, of one size or of all."""
    return sum(row.comparisons for row in rows if size in ("", row.size))


def main() -> None:
    """Measure and print, or serve one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=100_000, help="comparisons to make of all sizes, about")
    parser.add_argument("--sizes", default=",".join(SIZES), help="models to compare, by name")
    parser.add_argument("--calibration", type=Path, help="file for the worst honest deviations")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for row in measure(arguments.comparisons, arguments.sizes.split(",")):
        show(row)
        rows.append(row)
        if row.moment == MOMENTS[-1]:
            print(f"{row.size:>5}: {made(rows, row.size)} comparisons, {made(rows)} so far", flush=True)
    comparisons, faults = made(rows), sum(row.faults for row in rows)
    worst = calibration_of(largest(row.whole for row in rows), largest(row.sketched for row in rows))
    of_sizes = {row.size: made(rows, row.size) for row in rows}
    report = {"comparisons": comparisons, "of_sizes": of_sizes, "faults": faults, "worst": worst}
    if arguments.calibration:
        arguments.calibration.write_text(json.dumps(report) + "\n")
    print(json.dumps({**report, "seconds": round(time.perf_counter() - started)}))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
