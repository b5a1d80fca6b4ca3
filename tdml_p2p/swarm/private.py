"""The client's side of a private run: its two ends at work, and the inputs that it sent to the stages beside them.

Auditors of these stages are told of activations and gradients as any worker tells of its own. Tokens and labels are
not among what is kept here, so that nobody can ask for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from chain.keys import PrivateKey
from tdml_p2p.swarm.inputs import Descriptor, Wanted, expected_messages, signed_input
from tdml_p2p.swarm.session import SPARE_STATES
from trainer.content import address_of
from trainer.coordinator_ports import Governor
from trainer.ends import Ends, EndsGovernor, FetchState
from trainer.manifest import TaskManifest
from trainer.payloads import Dtype, pack
from trainer.stage import build_stage
from trainer.state import StageState
from trainer.trace import Recorder, recording
from trainer.transport import Transport
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT, Compute, StateUnavailable, T, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

if TYPE_CHECKING:
    from torch import Tensor

    from chain.engine import ChainEngine
    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.posting import Posted

_Cell = tuple[int, int, int, int]


class SentBook:
    """What the ends sent of committed steps, as it was encoded, by cell and by content address."""

    def __init__(self, key: PrivateKey, task: bytes, manifest: TaskManifest) -> None:
        self._key = key
        self._task = task
        self._manifest = manifest
        self._sent: dict[_Cell, bytes] = {}
        self._tensors: dict[bytes, memoryview] = {}

    async def add(self, record: StepRecord) -> None:
        """Keep what an end sent of a step: outputs of the first stage, input gradients of the last."""
        tensors = {cell.cell: cell.gx if record.stage else cell.y for cell in record.cells}
        encoded = await trio.to_thread.run_sync(_encoded, tensors, self._manifest.wire)
        for cell, (address, data) in encoded.items():
            self._sent[record.generation, record.step, record.stage, cell] = address
            self._tensors[address] = data

    def forget(self, settled: int, generation: int) -> None:
        """Drop what nobody can be audited for any more."""
        kept = {at: sent for at, sent in self._sent.items() if at[1] > settled and at[0] >= generation - 1}
        if len(kept) < len(self._sent):
            self._sent = kept
            self._tensors = {sent: self._tensors[sent] for sent in kept.values()}

    def blob(self, address: bytes) -> memoryview | None:
        """Return a tensor that was sent."""
        return self._tensors.get(address)

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return the inputs that an end sent of a cell of the stage beside it, signed as they were then."""
        if wanted.task != self._task or wanted.stage not in self._manifest.seated:
            return None
        last = self._manifest.stages - 1
        x = self._sent.get((wanted.generation, wanted.step, 0, wanted.cell)) if wanted.stage == 1 else None
        gy = self._sent.get((wanted.generation, wanted.step, last, wanted.cell)) if wanted.stage == last - 1 else None
        if x is None and gy is None:
            return None
        activation, gradient = expected_messages(wanted, self._manifest)
        return Descriptor(
            None if x is None else signed_input(self._key, self._task, activation, x),
            None if gy is None else signed_input(self._key, self._task, gradient, gy),
        )


@dataclass(frozen=True)
class Links:
    """What a coordinator reaches the chain, the members and their states by."""

    governor: Governor
    transport: Transport
    fetch_state: FetchState


class PrivateEnds:
    """The ends of one task at work, and the book of what they sent. Must be run."""

    def __init__(self, ends: Ends, book: SentBook, engine: "ChainEngine", task: bytes) -> None:
        self._ends = ends
        self._book = book
        self._engine = engine
        self._task = task

    def around(self, links: Links) -> Links:
        """Return what the coordinator reaches the ends by, and through `links` all others."""
        governor = EndsGovernor(links.governor, self._ends)
        return Links(governor, self._ends.transport, self._ends.fetching(links.fetch_state))

    async def run(self) -> None:
        """Run the ends and forget what has settled, until cancelled; of the work only the computing is traced."""
        with recording(None):
            async with trio.open_nursery() as nursery, self._engine.subscribe() as blocks:
                nursery.start_soon(self._ends.run)
                async for _ in blocks:
                    task = self._engine.state.task(self._task)
                    if task is not None:
                        self._ends.forget(task.settled)
                        self._book.forget(task.settled, task.generation)


async def hold_ends(peer: "Peer", posted: "Posted", network: Transport, recorder: Recorder | None) -> PrivateEnds:
    """Return the ends of a private task behind the client's transport, and have the peer serve what they send."""
    assert peer.swarm is not None  # every peer has a swarm service
    prepared, config = posted.prepared, peer.config
    manifest = prepared.manifest
    compute = _traced(peer.swarm.compute, recorder)
    book = SentBook(peer.key, posted.task, manifest)

    async def given(root: bytes, _: tuple[str, ...]) -> StageState:
        await trio.lowlevel.checkpoint()
        for state in (*prepared.states, *prepared.ends):
            if state.root == root:
                return state
        raise StateUnavailable("the client does not hold this state")

    seats = []
    for index in (0, manifest.stages - 1):
        stage = await compute(partial(build_stage, manifest, index, config.recompute))
        depth, memory = manifest.audit.depth + SPARE_STATES, config.memory or DEFAULT_MEMORY_LIMIT
        seats.append(WorkerConfig(network.peer, stage, manifest, depth, memory))
    peer.swarm.add_source(book.blob)
    peer.swarm.describe_more = book.describe
    ends = Ends(seats, network, WorkerPorts(compute, given, book.add))
    return PrivateEnds(ends, book, peer.engine, posted.task)


def _encoded(tensors: "dict[int, Tensor]", wire: Dtype) -> dict[int, tuple[bytes, memoryview]]:
    """Return the bytes in which tensors were sent, with their addresses."""
    packed = {cell: pack(tensor, wire)[0].data for cell, tensor in tensors.items()}
    return {cell: (address_of(data), data) for cell, data in packed.items()}


def _traced(compute: Compute, recorder: Recorder | None) -> Compute:
    """Return a way to compute whose work the recorder sees."""

    async def traced(work: Callable[[], T], /) -> T:
        with recording(recorder):
            return await compute(work)

    return traced
