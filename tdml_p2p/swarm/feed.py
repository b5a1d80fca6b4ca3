"""What the client serves besides the stream: inputs of the pipeline's ends, states, and frozen weights."""

from collections import OrderedDict

from chain.keys import PrivateKey
from tdml_p2p.swarm.inputs import Descriptor, Wanted, expected_messages, signed_input
from tdml_p2p.swarm.preparation import Prepared
from trainer.content import address_of
from trainer.messages import Labels, Tokens
from trainer.tensors import buffer_of

_KEPT = 1024


class ClientFeed:
    """Tokens and labels by cell, made again from the data when an auditor asks; states and frozen weights."""

    def __init__(self, key: PrivateKey, task: bytes, prepared: Prepared) -> None:
        self._key = key
        self._task = task
        self._prepared = prepared
        self._served: OrderedDict[bytes, memoryview] = OrderedDict()
        self._states: dict[bytes, memoryview] = {}
        served = [prepared.states[stage] for stage in prepared.manifest.seated] if prepared.states else []
        for state in served:
            manifest = state.manifest
            addresses = (manifest.root(), manifest.weights, manifest.m, manifest.v)
            buffers = (memoryview(manifest.encode()), *state.buffers())
            self._states |= zip(addresses, buffers, strict=True)

    def blob(self, address: bytes) -> memoryview | None:
        """Return served tokens or labels, a part of a state or of the frozen weights, by content address."""
        frozen = self._prepared.frozen
        found = self._served.get(address) or self._states.get(address)
        return frozen.base.blob(address) if found is None and frozen is not None else found

    def source(self, step: int, stage: int, me: str) -> tuple[bytes, tuple[str, ...]]:
        """Return the root of a stage's state after `step` and this peer as its holder, if it has it."""
        state = self._prepared.given(step, stage)
        return (b"", ()) if state is None else (state.root, (me,))

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return the inputs that the client sends of a cell: tokens to the first stage, labels to the last.

        In a private run neither is sent, nor told about.
        """
        manifest = self._prepared.manifest
        is_known = wanted.task == self._task and wanted.cell < manifest.microbatches and not manifest.private
        if not is_known or not 1 <= wanted.step <= manifest.steps or wanted.stage >= manifest.stages:
            return None
        batch = self._prepared.batches.batch(wanted.step, wanted.cell)
        x, gy = expected_messages(wanted, manifest)
        tokens = self._keep(buffer_of(batch.tokens)) if isinstance(x, Tokens) else None
        labels = self._keep(buffer_of(batch.labels)) if isinstance(gy, Labels) else None
        if tokens is None and labels is None:
            return None
        return Descriptor(
            None if tokens is None else signed_input(self._key, self._task, x, tokens),
            None if labels is None else signed_input(self._key, self._task, gy, labels),
        )

    def _keep(self, data: memoryview) -> bytes:
        address = address_of(data)
        self._served[address] = data
        self._served.move_to_end(address)
        while len(self._served) > _KEPT:
            self._served.popitem(last=False)
        return address
