"""Deviations of honest configurations and of attacks, as `trainer.compare` measures them, against τ.

A small Llama is trained a little; then one cell of each of three stages is re-executed in processes with
other kernels, threads and batch splits (honest), and with wrong arithmetic (attacks). Prints a table, then
one JSON line. `--calibration FILE` keeps the worst honest deviation for `tdml-peer init --calibration FILE`.
`bench.noise` is the same for many cells of models of several sizes, at several moments of their training.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from torch import Tensor

from chain.params import Params
from chain.verdicts import limits_for, wide_limits
from tdml_p2p.swarm.contradictions import tolerances
from trainer.compare import Thresholds, compare
from trainer.data import Corpus, load_batches, standard_library
from trainer.families import linear
from trainer.local import train_locally, whole
from trainer.manifest import OptimizerSettings, TaskManifest, complete, decode_manifest, encode_manifest
from trainer.sketch import cell_sketch
from trainer.stage import CellResult, Stage, build_stage, execute, stage_layout
from trainer.state import StageState
from trainer.tokens import byte_tokenizer

CONFIG: dict[str, int | float | bool | str] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 688,
    "num_attention_heads": 4,
}
STAGES = 3
KEY = bytes(range(32))
HONEST: dict[str, dict[str, str]] = {
    "other process": {},
    "2 threads": {"THREADS": "2"},
    "batch split": {"SPLIT": "1"},
    "MKL instead of oneDNN": {"PLAIN": "1"},
    "MKL, AVX2 vector code": {"PLAIN": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    "MKL, SSE vector code": {"PLAIN": "1", "ATEN_CPU_CAPABILITY": "default"},
    "MKL, SSE4.2 products": {"PLAIN": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL, compatible products": {"PLAIN": "1", "MKL_CBWR": "COMPATIBLE"},
    "oneDNN, AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN, SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "MKL, batch split, 2 threads": {"PLAIN": "1", "SPLIT": "1", "THREADS": "2"},
}
FP32 = tolerances(limits_for(Params()))
WIDE = tolerances(wide_limits(Params()))
SKETCHED = "any two of them, by sketches"
Cell = tuple[Tensor, Tensor | None, Tensor | None]


def main() -> None:
    """Run the comparison, or one re-execution when called with --child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--steps", type=int, default=60, help="training steps before the comparison")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--calibration", type=Path, help="file for the worst honest deviations")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        reexecute(arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), arguments.steps, arguments.precision)
    if arguments.calibration:
        whole = largest(found for name, found in report["honest"].items() if name != SKETCHED)
        limits = limits_of(arguments.precision)
        worst = calibration_of(whole, report["honest"][SKETCHED], limits.fraud_factor)
        pairs = len(HONEST) * (len(HONEST) + 1) // 2
        told = {"worst": worst, "comparisons": pairs * STAGES, "precision": arguments.precision}
        arguments.calibration.write_text(json.dumps(told) + "\n")
    if not arguments.json:
        show(report)
    print(json.dumps(report))


def limits_of(precision: str) -> Thresholds:
    """Return the limits between unlike kernels."""
    return FP32 if precision == "fp32" else WIDE


def measure(folder: Path, steps: int, precision: str = "fp32") -> dict[str, dict[str, list[float]]]:
    """Return the largest deviation of y, gx, gw of every honest configuration and attack."""
    torch.set_num_threads(1)
    manifest, states, stale = prepare(folder, steps, precision)
    cells = record_cells(folder, manifest, states)
    reference = [run(manifest, states, cells, index) for index in range(STAGES)]
    results = {name: honest_results(folder, name) for name in HONEST}
    honest = {name: worst_of(result, reference) for name, result in results.items()}
    pairs = list(itertools.combinations([reference, *results.values()], 2))
    honest["any two of them"] = largest(worst_of(one, other) for one, other in pairs)
    honest[SKETCHED] = largest(sketched(one, other) for one, other in pairs)
    attacks = {
        name: worst_of([attack(index) for index in range(STAGES)], reference)
        for name, attack in attacks_on(manifest, states, stale, cells, reference).items()
    }
    tau = limits_of(precision)
    return {"tau": {"tau": [tau.y, tau.gx, tau.gw]}, "honest": honest, "attacks": attacks}


def prepare(folder: Path, steps: int, precision: str) -> tuple[TaskManifest, list[Tensor], list[Tensor]]:
    """Return a trained model's manifest, its stages' weights, and those of one step before."""
    settings = OptimizerSettings(learning_rate=6e-4, warmup_steps=10)
    draft = TaskManifest("llama", CONFIG, stages=STAGES, cuts=(1, 2, 1), batch=4, microbatches=2, optimizer=settings)
    manifest = complete(structs.replace(draft, precision=precision))
    data = load_batches(Corpus((standard_library(),), limit=1 << 20), byte_tokenizer(), manifest)
    before = train_locally(manifest, data, steps)
    after = train_locally(manifest, data, steps + 1, state=before)
    tokens, labels = data.batch(steps + 2, 0)
    save_file({"tokens": tokens.contiguous(), "labels": labels.contiguous()}, folder / "batch.safetensors")
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return manifest, split(manifest, after), split(manifest, before)


def split(manifest: TaskManifest, state: StageState) -> list[Tensor]:
    """Return the stages' weights out of the whole model's."""
    uncut = stage_layout(whole(manifest), 0)
    flat = {
        tensor.name: state.weights[start:stop]
        for tensor, (start, stop) in zip(uncut.tensors, uncut.ranges, strict=True)
    }
    return [
        torch.cat([flat[tensor.name] for tensor in stage_layout(manifest, index).tensors]) for index in range(STAGES)
    ]


def record_cells(folder: Path, manifest: TaskManifest, states: list[Tensor]) -> list[Cell]:
    """Return each stage's inputs of one micro-batch, and save them with the weights for the processes."""
    batch = load_file(folder / "batch.safetensors")
    inputs = [batch["tokens"]]
    for index in range(STAGES - 1):
        inputs.append(loaded(manifest, states[index], index).logits(inputs[-1]))
    cells: list[Cell] = [(inputs[-1], batch["labels"], None)]
    for index in reversed(range(STAGES)):
        gx = execute(loaded(manifest, states[index], index), *cells[0]).gx
        if index:
            cells.insert(0, (inputs[index - 1], None, gx))
    save_cells(folder, states, cells)
    return cells


def save_cells(folder: Path, states: list[Tensor], cells: list[Cell]) -> None:
    """Save the stages' cells for the processes that execute them."""
    saved = {f"w{index}": weights for index, weights in enumerate(states)}
    for index, (x, labels, gy) in enumerate(cells):
        parts = {"x": x, "labels": labels, "gy": gy}
        saved.update({f"{name}{index}": part for name, part in parts.items() if part is not None})
    save_file({name: part.clone() for name, part in saved.items()}, folder / "cells.safetensors")


def loaded(manifest: TaskManifest, weights: Tensor, index: int) -> Stage:
    """Return a stage on given weights."""
    stage = build_stage(manifest, index)
    stage.load(weights)
    return stage


def plain(manifest: TaskManifest, weights: Tensor, index: int) -> Stage:
    """Return a stage on given weights whose linear layers are torch's own."""
    with mock.patch.object(linear, "is_available", return_value=False):
        return loaded(manifest, weights, index)


def run(manifest: TaskManifest, states: list[Tensor], cells: list[Cell], index: int) -> CellResult:
    """Return one stage's result of its cell."""
    return execute(loaded(manifest, states[index], index), *cells[index])


def honest_results(folder: Path, name: str) -> list[CellResult]:
    """Return the results of another process in one honest configuration."""
    environment = {**os.environ, **HONEST[name], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "bench.numerics", "--child", str(folder)]
    subprocess.run(command, check=True, env=environment)
    # cloned: the next process writes the file that these tensors are mapped to
    parts = {key: part.clone() for key, part in load_file(folder / "results.safetensors").items()}
    return [CellResult(parts[f"y{i}"], parts[f"gx{i}"], parts[f"gw{i}"], ()) for i in range(STAGES)]


def reexecute(folder: Path, name: str = "results.safetensors") -> None:
    """Re-execute the saved cells as the environment says, and save the results."""
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    manifest = decode_manifest((folder / "manifest.json").read_bytes())
    saved = load_file(folder / "cells.safetensors")
    results: dict[str, Tensor] = {}
    build = plain if "PLAIN" in os.environ else loaded
    for index in range(STAGES):
        cell = (saved[f"x{index}"], saved.get(f"labels{index}"), saved.get(f"gy{index}"))
        stage = build(manifest, saved[f"w{index}"], index)
        result = halves(stage, cell) if "SPLIT" in os.environ else execute(stage, *cell)
        results.update({f"y{index}": result.y, f"gx{index}": result.gx, f"gw{index}": result.gw})
    save_file({key: part.contiguous() for key, part in results.items()}, folder / name)


def halves(stage: Stage, cell: Cell) -> CellResult:
    """Return a cell's result computed as two halves of its batch."""
    rows = cell[0].shape[0] // 2
    parts = [execute(stage, *(None if part is None else part[at : at + rows] for part in cell)) for at in (0, rows)]
    # the last stage's loss is a mean over the half batch: its gradients weigh twice as much
    weight = 0.5 if stage.spec.is_last else 1.0
    gx = torch.cat([part.gx for part in parts]) * weight
    return CellResult(torch.cat([part.y for part in parts]), gx, (parts[0].gw + parts[1].gw) * weight, ())


def worst_of(claimed: list[CellResult], own: list[CellResult]) -> list[float]:
    """Return the largest deviations of y, gx and gw over the stages."""
    verdicts = [compare(one, other, FP32) for one, other in zip(claimed, own, strict=True)]
    return largest([verdict.y, verdict.gx, verdict.gw] for verdict in verdicts)


def sketched(claimed: list[CellResult], own: list[CellResult]) -> list[float]:
    """Return the largest relative distances of the sketches, which is what the ledger compares."""
    return largest(
        [
            float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
            for a, b in zip(projections(one), projections(other), strict=True)
        ]
        for one, other in zip(claimed, own, strict=True)
    )


def projections(result: CellResult) -> npt.NDArray[np.float64]:
    """Return a cell's sketch as three rows of 32 projections."""
    data = cell_sketch(result.y, result.gx, result.gw, KEY)
    return np.frombuffer(data, "<f4").astype(np.float64).reshape(3, -1)


def calibration_of(whole: list[float], sketched: list[float], factor: float = FP32.fraud_factor) -> list[float]:
    """Return the worst deviations for a calibration: τ, ten times these, judges sketches, `factor` τ whole tensors.

    Both have a margin of ten.
    """
    return largest([sketched, [worst / factor for worst in whole]])


def largest(rows: Iterable[list[float]]) -> list[float]:
    """Return the largest value of each column."""
    return [max(column) for column in zip(*rows, strict=True)]


def attacks_on(
    manifest: TaskManifest,
    states: list[Tensor],
    stale: list[Tensor],
    cells: list[Cell],
    honest: list[CellResult],
) -> dict[str, Callable[[int], CellResult]]:
    """Return what each attack makes of a stage's cell."""
    generator = torch.Generator().manual_seed(1)

    def noisy(tensor: Tensor, ratio: float) -> Tensor:
        scale = ratio * float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
        return tensor + scale * torch.randn(tensor.shape, generator=generator)

    def each(change: Callable[[Tensor], Tensor]) -> Callable[[int], CellResult]:
        def changed(index: int) -> CellResult:
            y, gx, gw, _ = honest[index]
            return CellResult(change(y), change(gx), change(gw), ())

        return changed

    def with_weights(change: Callable[[int], Tensor]) -> Callable[[int], CellResult]:
        return lambda index: execute(loaded(manifest, change(index), index), *cells[index])

    def bf16(index: int) -> CellResult:
        stage = plain(manifest, states[index], index)
        with torch.autocast("cpu", torch.bfloat16):
            y, gx, gw, _ = execute(stage, *cells[index])
        return CellResult(y.float(), gx.float(), gw.float(), ())

    return {
        "sign flip": each(lambda part: -part),
        "zeros": each(torch.zeros_like),
        "scaled by 1.01": each(lambda part: part * 1.01),
        "scaled by 1.001": each(lambda part: part * 1.001),
        "noise 1e-2": each(lambda part: noisy(part, 1e-2)),
        "noise 1e-4": each(lambda part: noisy(part, 1e-4)),
        "weights one step stale": with_weights(lambda index: stale[index]),
        "int8 weights": with_weights(lambda index: int8(manifest, states[index], index)),
        "bf16 compute": bf16,
        "a layer skipped": with_weights(lambda index: skipped(manifest, states[index], index)),
        "weight gradient skipped": lambda index: honest[index]._replace(gw=torch.zeros_like(honest[index].gw)),
    }


def int8(manifest: TaskManifest, weights: Tensor, index: int) -> Tensor:
    """Return the weights rounded to int8 with one scale a tensor."""
    rounded, layout = weights.clone(), stage_layout(manifest, index)
    for start, stop in layout.ranges:
        scale = weights[start:stop].abs().max() / 127
        rounded[start:stop] = (weights[start:stop] / scale).round() * scale
    return rounded


def skipped(manifest: TaskManifest, weights: Tensor, index: int) -> Tensor:
    """Return the weights with the stage's first layer made an identity."""
    changed, layout = weights.clone(), stage_layout(manifest, index)
    first = f"layers.{manifest.stage(index).first}."
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        if first in tensor.name and ("o_proj" in tensor.name or "down_proj" in tensor.name):
            changed[start:stop] = 0
    return changed


def show(report: dict[str, dict[str, list[float]]]) -> None:
    """Print the table, each deviation with its multiple of τ."""
    tau = report["tau"]["tau"]
    print(f"{'':34}{'y':>20}{'gx':>20}{'gw':>20}")
    for title in ("tau", "honest", "attacks"):
        for name, values in report[title].items():
            cells = "".join(
                f"{value:>11.1e} {f'({value / limit:.2g}τ)':>8}" for value, limit in zip(values, tau, strict=True)
            )
            print(f"{name:34}{cells}")


if __name__ == "__main__":
    main()
