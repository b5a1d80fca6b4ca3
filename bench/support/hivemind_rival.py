"""hivemind.moe as a rival: a server a stage, and a client that sends micro-batches through them at once.

`run_hivemind` runs this file with the Python of hivemind's own virtual environment, which it makes where there is
none. Only torch, transformers and hivemind are imported there. hivemind repeats the forward half in every backward
one and steps its optimiser after each micro-batch; the client computes nothing but the loss of per-token losses.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("torch==2.13.0", "hivemind==1.1.12", "transformers==5.23.0")
_ROOT = Path(__file__).parents[2]
_MOST_SECONDS = 1800.0
Run = dict[str, Any]


def make_environment(folder: Path) -> None:
    """Install hivemind into `folder`, in an order that lets it build."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for package in PACKAGES:
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", package], check=True)


def run_hivemind(job: Any, folder: Path) -> Run:
    """Return seconds and processor time of each step; `folder` is a virtual environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        make_environment(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}

    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [str(python), "-m", "bench.support.hivemind_rival", job.encode(), *arguments]
        started = subprocess.Popen(
            command, env=environment, stdin=-1, stdout=-1, stderr=-3, text=True, cwd=_ROOT, start_new_session=True
        )
        everyone.append(started)
        return started

    everyone: list[subprocess.Popen[str]] = []
    servers: list[subprocess.Popen[str]] = []
    watch = threading.Timer(_MOST_SECONDS, _end, [everyone])
    watch.daemon = True
    watch.start()
    try:
        address = ""
        for index in range(len(job.cuts)):
            servers.append(start("serve", str(index), *([address] if address else [])))
            address = address or _line(servers[0])["address"]
        for server in servers[1:]:
            _line(server)
        client = start("train", address)
        found = _line(client)
        client.communicate()
        return found
    finally:
        for server in servers:
            server.communicate()
        watch.cancel()


def _end(processes: "list[subprocess.Popen[str]]") -> None:
    """End processes with all that they have started: hivemind now and then hangs when it starts."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _line(process: "subprocess.Popen[str]") -> Run:
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("{"):
            found: Run = json.loads(text)
            return found
    raise RuntimeError("hivemind said nothing")


def serve(job: Any, index: int, peers: list[str]) -> None:
    """Serve one stage until standard input closes."""
    import hivemind
    import torch
    from hivemind.moe.server.module_backend import ModuleBackend
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    is_last = index == len(job.cuts) - 1
    flat = BatchTensorDescriptor(job.sequence)
    hidden = BatchTensorDescriptor(job.sequence, job.config["hidden_size"])
    part = _Ends(job.part(index), is_first=index == 0, is_last=is_last)
    inputs = (flat if index == 0 else hidden, *([flat] if is_last else []))
    backend = ModuleBackend(
        f"part.{index}",
        part,
        optimizer=torch.optim.AdamW(part.parameters(), 1e-3),
        args_schema=inputs,
        outputs_schema=flat if is_last else hidden,
        max_batch_size=job.batch,
    )
    dht = hivemind.DHT(initial_peers=peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    server = hivemind.moe.Server(dht, {backend.name: backend}, num_connection_handlers=1, start=True)
    server.ready.wait()
    print(json.dumps({"address": str(dht.get_visible_maddrs()[0])}), flush=True)
    sys.stdin.read()
    server.shutdown()
    dht.shutdown()


def train(job: Any, peer: str) -> None:
    """Train through the servers; print seconds of each step."""
    import hivemind
    from hivemind.moe import get_experts

    dht = hivemind.DHT(initial_peers=[peer], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    names = [f"part.{index}" for index in range(len(job.cuts))]
    parts: list[Any] = []
    while not parts or None in parts:
        parts = get_experts(dht, names)
        time.sleep(0.5)
    tokens, labels = (whole.float().chunk(job.microbatches) for whole in job.batches())

    def cell(index: int) -> None:
        value = tokens[index]
        for part in parts[:-1]:
            value = part(value)
        (parts[-1](value, labels[index]).mean() / job.microbatches).backward()

    seconds = []
    with ThreadPoolExecutor(job.microbatches) as pool:
        for _ in range(job.warm_up + job.steps):
            started = time.perf_counter()
            list(pool.map(cell, range(job.microbatches)))
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds[job.warm_up :]}), flush=True)
    dht.shutdown()


def _Ends(part: Any, *, is_first: bool, is_last: bool) -> Any:  # noqa: N802
    """Return the stage with floats at its ends, for hivemind carries gradients of every input."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            y: Tensor = self.part(x.long() if is_first else x)
            if not is_last or labels is None:
                return y
            losses = functional.cross_entropy(y.flatten(0, 1), labels.long().flatten(), reduction="none")
            return losses.view(labels.shape)

    torch.set_num_threads(1)
    return Ends()


def main() -> None:
    """Be a server or the client."""
    from bench.support.halves import decode_job

    job, role, *rest = decode_job(sys.argv[1]), *sys.argv[2:]
    if role == "serve":
        serve(job, int(rest[0]), rest[1:])
    else:
        train(job, rest[0])


if __name__ == "__main__":
    main()
