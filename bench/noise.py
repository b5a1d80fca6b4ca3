"""Honest noise, many times: every two configurations of software and hardware compared, over sizes and moments.

Llamas of several sizes are trained a little; cells of their first steps, of later ones and of a loss spike are
re-executed in a process for each configuration: threads, oneDNN or MKL, instruction sets, MKL's modes, batch
splits. Every pair of results is compared twice, as in an audit: sketches, which may differ by τ, and whole tensors,
whose worst row may differ by a hundred times that. Where a pair differs by more, both machines execute the cell again
as judges do, with other last bits, and each allows the other ten times its own spread: only what is beyond that, from
either side, is a fault, unless a machine finds that it cannot judge. Prints a row for each size and moment, deviations
as shares of what is allowed without a second look, how many comparisons needed one and the largest share of what was
then allowed, a line for each size, then one JSON line; the exit status is 1 if anything honest was a fault.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    save_cells,
    split,
)
from chain.hashing import digest
from chain.params import Params
from chain.verdicts import Deviations, deviations, is_match, limits_for
from tdml_p2p.swarm.contradictions import tolerances
from tdml_p2p.swarm.doubts import SEEDS, tolerance_of, unsteadiness
from trainer.compare import compare
from trainer.data import Corpus, load_batches, standard_library
from trainer.local import train_locally
from trainer.manifest import OptimizerSettings, TaskManifest, complete, encode_manifest
from trainer.sketch import cell_sketch
from trainer.spread import shaken_cell, spread_of
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
_LIMITS = limits_for(Params())
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
RATES = (1.0,)
"""Learning rates of the step after which the loss leaps."""


@dataclass
class Row:
    """What was found at one moment of a model's training: worst deviations in whole tensors and in sketches."""

    size: str
    moment: str
    loss: float = 0.0
    cells: int = 0
    comparisons: int = 0
    faults: int = 0
    doubts: int = 0
    """Comparisons that needed a second look."""
    doubted: float = 0.0
    """The largest share that any deviation then had of what was allowed."""
    unjudged: int = 0
    """Judgements that a machine then left to others, its own results being too unsteady."""
    whole: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    sketched: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


Results = Callable[[int], list[CellResult]]
"""What every machine, this process first, makes of a stage's cell."""
Again = Callable[[], list[Results]]
"""Has every machine execute the cells again with other last bits, and then again."""


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


def moments(manifest: TaskManifest, data: Any, later: int, rates: Sequence[float]) -> Iterator[tuple[str, StageState]]:
    """Yield states of a training: after its first step, later, and after steps so long that the loss leaps."""
    early = train_locally(manifest, data, 1)
    yield MOMENTS[0], early
    after = train_locally(manifest, data, later, state=early)
    yield MOMENTS[1], after
    for rate in rates:
        wild = replace(manifest, optimizer=OptimizerSettings(learning_rate=rate, warmup_steps=1))
        yield f"{MOMENTS[2]} {rate:g}", train_locally(wild, data, later + 1, state=after)


def measure(wanted: int, names: list[str], rates: Sequence[float] = RATES) -> Iterator[Row]:
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
            batches = max(1, round(wanted * size.share / total / pairs / STAGES / (2 + len(rates))))
            for moment, state in moments(manifest, data, size.later, rates):
                row = Row(name, moment)
                for number in range(batches):
                    tokens, labels = data.batch(size.later + 2 + number // 2, number % 2)
                    batch = {"tokens": tokens.contiguous(), "labels": labels.contiguous()}
                    save_file(batch, folder / "batch.safetensors")
                    states = split(manifest, state)
                    looks = Looks(machines, folder, manifest, states, record_cells(folder, manifest, states))
                    compare_all(row, looks.first(), looks.again)
                row.loss /= batches
                yield row


class Looks:
    """All machines' executions of a micro-batch's cells: as they are, and shaken where a difference asks for it."""

    def __init__(
        self, machines: Machines, folder: Path, manifest: TaskManifest, states: list[Tensor], cells: list[Cell]
    ) -> None:
        self._machines = machines
        self._folder = folder
        self._manifest = manifest
        self._states = states
        self._cells = cells
        self._shaken: list[Results] = []

    def first(self) -> Results:
        """Return the results of the cells as they are."""
        return self._executed(self._folder, self._states, self._cells)

    def again(self) -> list[Results]:
        """Return the results of the shaken cells, executed at the first call."""
        self._shaken = self._shaken or [self._second(seed) for seed in SEEDS]
        return self._shaken

    def _second(self, seed: int) -> Results:
        folder = self._folder / f"shaken{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_bytes(encode_manifest(self._manifest))
        states, cells = [], []
        for weights, (x, labels, gy) in zip(self._states, self._cells, strict=True):
            back = labels if gy is None else gy
            assert back is not None
            weights, x, back = shaken_cell(weights, x, back, seed)
            states.append(weights)
            cells.append((x, back, None) if gy is None else (x, None, back))
        save_cells(folder, states, cells)
        return self._executed(folder, states, cells)

    def _executed(self, folder: Path, states: list[Tensor], cells: list[Cell]) -> Results:
        files = self._machines.execute(folder)
        return lambda stage: [run(self._manifest, states, cells, stage), *(_read(file, stage) for file in files)]


def compare_all(row: Row, first: Results, again: Again) -> None:
    """Add to `row` what every two results of a micro-batch's cells differ by."""
    for stage in range(STAGES):
        results = first(stage)
        key = digest("noise", row.size.encode(), row.moment.encode(), row.cells.to_bytes(8, "big"))
        sketches = [cell_sketch(one.y, one.gx, one.gw, key) for one in results]
        if stage == STAGES - 1:
            row.loss += float(results[0].y.mean())
        row.cells += 1
        beyond = []
        for one, other in itertools.combinations(range(len(results)), 2):
            sides = ((one, other), (other, one))
            found = [compare(results[claimed], results[own], FP32) for claimed, own in sides]
            short = [deviations(sketches[claimed], sketches[own]) for claimed, own in sides]
            row.comparisons += 1
            row.whole = largest([row.whole, *([each.y, each.gx, each.gw] for each in found)])
            row.sketched = largest([row.sketched, *map(list, short)])
            if any(each.is_fraud for each in found) or not all(is_match(each, _LIMITS) for each in short):
                beyond.append((one, other))
        row.doubts += len(beyond)
        if beyond:
            row.faults += _second_look(row, results, [look(stage) for look in again()], beyond, key)


def _second_look(
    row: Row, results: list[CellResult], shaken: list[list[CellResult]], beyond: list[tuple[int, int]], key: bytes
) -> int:
    """Return how many of these pairs are beyond what one of the two allows that has executed the cell again."""
    judges = {machine: Judge(results[machine], [look[machine] for look in shaken], key) for machine in sum(beyond, ())}
    faults = 0
    for one, other in beyond:
        told = [judges[a].share(judges[b]) for a, b in ((one, other), (other, one))]
        worst = max((share for share in told if share is not None), default=0.0)
        row.unjudged += told.count(None)
        row.doubted = max(row.doubted, worst)
        faults += worst > 1
    return faults


class Judge:
    """A machine that has executed a cell, and again with other last bits."""

    def __init__(self, own: CellResult, shaken: list[CellResult], key: bytes) -> None:
        self.own = own
        self.sketch = cell_sketch(own.y, own.gx, own.gw, key)
        others = [cell_sketch(one.y, one.gx, one.gw, key) for one in shaken]
        self._times = unsteadiness(self.sketch, others, _LIMITS)
        self._thresholds = tolerances(_LIMITS, spread_of(own, shaken))

    def share(self, claimed: "Judge") -> float | None:
        """Return the largest share that a deviation of the other's results has of what this one allows.

        None where it says nothing.
        """
        found = deviations(claimed.sketch, self.sketch)
        tolerance = tolerance_of(self._times, [found], _LIMITS)
        if tolerance is None:
            return None
        whole = compare(claimed.own, self.own, self._thresholds)
        pairs: list[tuple[Deviations, Deviations]] = [
            (found, _LIMITS._replace(tolerance=tolerance).allowed),
            ((whole.y, whole.gx, whole.gw), self._thresholds.limits(self._thresholds.fraud_factor)),
        ]
        return max(found / limit for side in pairs for found, limit in zip(*side, strict=True))


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
    counts += f" {row.doubts} second looks ({row.doubted:.2f}, {row.unjudged} unjudged)"
    print(f"{row.size:>5} {row.moment:9} loss {row.loss:6.2f} {counts}", *(f"{one:7.4f}" for one in shares), flush=True)


def made(rows: list[Row], size: str = "") -> int:
    """Return how many comparisons were made, of one size or of all."""
    return sum(row.comparisons for row in rows if size in ("", row.size))


def main() -> None:
    """Measure and print, or serve one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=100_000, help="comparisons to make of all sizes, about")
    parser.add_argument("--sizes", default=",".join(SIZES), help="models to compare, by name")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of the steps after which losses leap")
    parser.add_argument("--calibration", type=Path, help="file for the worst honest deviations")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for row in measure(arguments.comparisons, arguments.sizes.split(","), arguments.rates):
        show(row)
        rows.append(row)
        if row.moment.startswith(MOMENTS[-1]):
            print(f"{row.size:>5}: {made(rows, row.size)} comparisons, {made(rows)} so far", flush=True)
    comparisons, faults = made(rows), sum(row.faults for row in rows)
    worst = calibration_of(largest(row.whole for row in rows), largest(row.sketched for row in rows))
    of_sizes = {row.size: made(rows, row.size) for row in rows}
    report = {"comparisons": comparisons, "of_sizes": of_sizes, "faults": faults, "worst": worst}
    report |= {"second_looks": sum(row.doubts for row in rows), "unjudged": sum(row.unjudged for row in rows)}
    if arguments.calibration:
        arguments.calibration.write_text(json.dumps(report) + "\n")
    print(json.dumps({**report, "seconds": round(time.perf_counter() - started)}))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
