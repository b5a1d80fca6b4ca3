"""What a seat asks of a machine's memory, from the manifest alone, before anybody applies for it.

`bench.memory` measures the same parts on a running worker. What autograd keeps of a cell and buffers on their way
are left out: they depend on kernels and links.
"""

from dataclasses import dataclass
from math import ceil, prod

from trainer.families import family_of
from trainer.manifest import TaskManifest
from trainer.payloads import TensorPayload
from trainer.stage import stage_layout
from trainer.tensor_shapes import Form, gradient_of, input_of
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT

_FLOAT = 4
DEPTH = 16
"""Steps that may be unsettled at once where they are short: an audit settles six to eight blocks after its step."""
_LEAST_DEPTH = 4
_AUDIT_SECONDS = 16.0
"""What an audit takes from its step's claim to its end, blocks being a second apart, and as much again."""
_FAST_FLOPS = 1e12
"""Operations per second of a fast worker."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a seat: `step` for the tensors of an open step, `resident` for weights, states and sums besides."""

    step: int
    resident: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.step + self.resident


def footprint(manifest: TaskManifest, index: int) -> Footprint:
    """Return what a seat of stage `index` needs while all its replicas do their share.

    A step holds its cells until it is over (`StepWork.nbytes`). Resident are the weights, weights and two moments of
    the current, the pending and every unsettled step, and the sum and mean.
    """
    trained = _FLOAT * stage_layout(manifest, index).total
    weights = _FLOAT * family_of(manifest.family).layout(manifest.config, manifest.stage(index)).total
    cells = -(-manifest.microbatches // (manifest.replicas // manifest.audit.redundancy))
    states = 3 * trained * (2 + manifest.audit.depth)
    return Footprint(step=cells * cell_bytes(manifest, index), resident=weights + states + 2 * trained)


def depth_of(manifest: TaskManifest) -> int:
    """Return how many steps a run may be ahead of its audits, each of which is a state in the memory of every worker.

    As many as fast workers do in the time of an audit: large models do fewer, and theirs are the states that take room.
    """
    family = family_of(manifest.family)
    weights = max(family.layout(manifest.config, manifest.stage(index)).total for index in manifest.seated)
    share = manifest.replicas // manifest.audit.redundancy
    seconds = 6.0 * weights * manifest.positions * manifest.microbatches / share / _FAST_FLOPS
    return max(_LEAST_DEPTH, min(DEPTH, ceil(_AUDIT_SECONDS / seconds)))


def cell_bytes(manifest: TaskManifest, index: int) -> int:
    """Return what a finished cell of stage `index` takes (`Cell.nbytes`): what came in, and all that was made of it."""
    return _FLOAT * stage_layout(manifest, index).total + _kept(manifest, index)


def _kept(manifest: TaskManifest, index: int) -> int:
    """Return the bytes of a finished cell beside its weight gradient.

    At a neighbour both the output and its gradient stay, with their encodings; the first stage has no gradient of its
    tokens, and the last has labels and losses.
    """
    into, out = input_of(manifest, index), gradient_of(manifest, index)
    before = 2 * _with_encoding(into) if index else _FLOAT * prod(into.shape)
    after = 2 * (_with_encoding(out) if index < manifest.stages - 1 else _FLOAT * prod(out.shape))
    return before + after


def _with_encoding(form: Form) -> int:
    payload = TensorPayload(form.dtype, form.shape, memoryview(b""))
    return _FLOAT * prod(form.shape) + (payload.nbytes if payload.is_encoded else 0)


def largest(manifest: TaskManifest) -> Footprint:
    """Return what the largest seat needs: the chain decides which one a peer gets."""
    return max((footprint(manifest, index) for index in manifest.seated), key=lambda found: found.total)


def available_bytes() -> int | None:
    """Return how much memory this machine can still give, None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def why_not(manifest: TaskManifest, memory: int, available: int | None, held: int = 0) -> str | None:
    """Return in a sentence why a machine does not hold every seat of a task, or None.

    `memory` bounds all that seats take (`start --memory`), of which `held` is taken; without it, 0, the tensors of a
    step are bounded. `available` is what the machine can still give.
    """
    need = largest(manifest)
    if memory and need.total + held > memory:
        other = f", and other seats {size_text(held)}" if held else ""
        return f"a seat takes about {size_text(need.total)}{other}: more than the {size_text(memory)} of --memory"
    if not memory and need.step > DEFAULT_MEMORY_LIMIT:
        usual = size_text(DEFAULT_MEMORY_LIMIT)
        return f"the tensors of a step take {size_text(need.step)}, more than the usual {usual}: start with --memory"
    if available is not None and need.total > available:
        return f"a seat takes about {size_text(need.total)} of memory, and {size_text(available)} are free"
    return None


def size_text(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
