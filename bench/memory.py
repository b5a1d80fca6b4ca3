"""What a worker holds in memory, added up from the shapes of its stage, against the most that it was seen to hold.

A swarm of real peers trains, and each worker's peak is read. Its parts are computed: `weights` the stage's parameters;
`states` weights and moments of the newest state and of every earlier one that has not settled; `gradients` a step's
weight gradients, one a cell, until they are summed; `kept` those of unsettled steps that may still be audited, within
their bound; `traces` inputs and outputs of those cells; `activations` what autograd keeps of the cells in flight;
`reduction` the sum and its mean. `base` is a process that has loaded the same libraries and a stage of one layer.

Prints one JSON object. Parts are upper bounds for the number of unsettled steps that the run is given, of which the
peak sees fewer; what remains is `other`: buffers on their way, fragmentation, and freed memory that is kept for reuse.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from bench.support.swarm_run import Training, run_swarm
from trainer.manifest import TaskManifest, complete
from trainer.presets import preset_of
from trainer.schedule import in_flight_limit
from trainer.stage import CellKey, build_stage, stage_layout
from trainer.state import initial_state
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT

_GRADIENTS_SHARE = 4
Run = dict[str, Any]


def manifest_of(training: Training) -> TaskManifest:
    """Return the manifest that a run trains by."""
    preset = preset_of(training.model)
    draft = TaskManifest(
        preset.family, preset.config, stages=training.stages, batch=training.batch, sequence=training.sequence
    )
    return complete(draft)


def parts(training: Training, index: int, unsettled: int) -> dict[str, int]:
    """Return bytes by part of a worker of stage `index` while `unsettled` steps wait for their audits."""
    manifest = manifest_of(training)
    weights = 4 * stage_layout(manifest, index).total
    hidden = 4 * manifest.batch * manifest.sequence * manifest.hidden
    cells = unsettled * training.microbatches
    in_flight = in_flight_limit(index, manifest.stages)
    return {
        "weights": weights,
        "states": 3 * weights * (1 + unsettled),
        "gradients": training.microbatches * weights,
        "kept": min(cells * weights, DEFAULT_MEMORY_LIMIT // _GRADIENTS_SHARE),
        "traces": cells * 3 * hidden,
        "activations": in_flight * activations(manifest, index),
        "reduction": 2 * weights,
    }


def activations(manifest: TaskManifest, index: int) -> int:
    """Return the bytes that autograd keeps of one cell, the weights not counted."""
    stage = build_stage(manifest, index)
    stage.load(initial_state(manifest, index).weights)
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.module.ordered()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (manifest.batch, manifest.sequence)
    tokens = torch.zeros(shape, dtype=torch.int32)
    x = tokens if stage.spec.is_first else torch.zeros(*shape, manifest.hidden)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stage.forward(CellKey(0, 1, 0), x, tokens if stage.spec.is_last else None)
    return sum(seen.values())


def base() -> int:
    """Return the peak of a process that has loaded what a worker loads."""
    program = (
        "import tdml_p2p.peer, tdml_p2p.swarm.session, trainer.kernel as k; k.kernel_class();"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=-1, text=True, check=True)
    return 1024 * int(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--model", default="llama-8m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--unsettled", type=int, default=3, help="steps that wait for their audits at once")
    options = parser.parse_args()
    training, started = Training(options.model, steps=options.steps, audit_rate=0.1), time.monotonic()
    peaks, least = sorted(run_swarm(training)["peak_memory"], reverse=True), base()
    rows = []
    accounted = [parts(training, index, options.unsettled) for index in range(training.stages)]
    for index, found in sorted(enumerate(accounted), key=lambda row: -sum(row[1].values())):
        peak = peaks[len(rows)]
        rows.append({"stage": index, "base": least, **found, "other": peak - least - sum(found.values()), "peak": peak})
    print(json.dumps({"workers": rows, "model": options.model, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
