"""Rivals that need only torch: plain training in one process, and its pipeline of one process a stage over gloo.

`python -m bench.support.rivals plain|pipeline JOB …` is one such process; the last one of a pipeline prints the
seconds of each step as JSON, and every process the processor time of each step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from torch import distributed
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from bench.support.halves import Job, decode_job, loss_of

Run = dict[str, Any]


def plain(job: Job) -> Run:
    """Train with `transformers` and `torch.optim.AdamW` in this process."""
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens, labels = (whole.chunk(job.microbatches) for whole in job.batches())

    def step() -> None:
        for x, y in zip(tokens, labels, strict=True):
            (loss_of(model(input_ids=x, use_cache=False).logits, y) / job.microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(job, step)


def pipeline(job: Job, rank: int, rendezvous: str) -> Run:
    """Train stage `rank` of a 1F1B pipeline in this process."""
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=len(job.cuts))
    part = job.part(rank)
    optimizer = torch.optim.AdamW(part.parameters(), 1e-3)
    stage = PipelineStage(part, rank, len(job.cuts), torch.device("cpu"))
    schedule = Schedule1F1B(stage, job.microbatches, loss_of)
    tokens, labels = job.batches()

    def step() -> None:
        if rank == 0:
            schedule.step(tokens)
        elif rank == len(job.cuts) - 1:
            schedule.step(target=labels)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        distributed.barrier()

    run = _timed(job, step)
    distributed.destroy_process_group()
    return run


def run_plain(job: Job, threads: int) -> Run:
    """Return the seconds and the processor time of each step, measured in a process of its own."""
    return _result(_process(["plain", job.encode()], threads))


def run_pipeline(job: Job) -> Run:
    """Return the same of one single-threaded process a stage."""
    with tempfile.TemporaryDirectory(prefix="tdml-bench-") as folder:
        processes = [
            _process(["pipeline", job.encode(), str(rank), f"{folder}/rendezvous"], 1) for rank in range(len(job.cuts))
        ]
        runs = [_result(process) for process in processes]
    cpu = [sum(of_step) for of_step in zip(*(run["cpu"] for run in runs), strict=True)]
    return {"seconds": runs[-1]["seconds"], "cpu": cpu}


def _timed(job: Job, step: Any) -> Run:
    seconds, cpu = [], []
    for _ in range(job.warm_up + job.steps):
        started, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {"seconds": seconds[job.warm_up :], "cpu": cpu[job.warm_up :]}


def _process(arguments: list[str], threads: int) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.support.rivals", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _result(process: "subprocess.Popen[str]") -> Run:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a rival ended with {process.returncode}")
    found: Run = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Be one process of a rival."""
    kind, job = sys.argv[1], decode_job(sys.argv[2])
    run = plain(job) if kind == "plain" else pipeline(job, int(sys.argv[3]), sys.argv[4])
    print(json.dumps(run))


if __name__ == "__main__":
    main()
