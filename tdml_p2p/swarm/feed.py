"""What the client serves besides the stream: inputs of the pipeline's ends, and states to resume from."""

from collections import OrderedDict

from chain.keys import PrivateKey
from tdml_p2p.swarm.inputs import Descriptor, Wanted, expected_messages, signed_input
from tdml_p2p.swarm.preparation import Prepared
from trainer.content import address_of
from trainer.messages import Labels, Tokens
from trainer.tensors import buffer_of

_KEPT = 1024


class ClientFeed:
    """Tokens and labels by cell, made again from the data when an auditor asks; the states of the client."""

    def __init__(self, key: PrivateKey, task: bytes, prepared: Prepared) -> None:
        self._key = key
        self._task = task
        self._prepared = prepared
        self._served: OrderedDict[bytes, memoryview] = OrderedDict()
        self._states: dict[bytes, memoryview] = {}
        for state in prepared.states:
            manifest = state.manifest
            addresses = (manifest.root(), manifest.weights, manifest.m, manifest.v)
            buffers = (memoryview(manifest.encode()), *state.buffers())
            self._states |= zip(addresses, buffers, strict=True)

    def blob(self, address: bytes) -> memoryview | None:
        """Return served tokens or labels, or a part of a state, by content address."""
        return self._served.get(address) or self._states.get(address)

    def source(self, step: int, stage: int, me: str) -> tuple[bytes, tuple[str, ...]]:
        """Return the root of a stage's state after `step` and this peer as its holder, if it has it."""
        states = self._prepared.states
        if not states or states[stage].step != step:
            return b"", ()
        return states[stage].root, (me,)

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return the inputs that the client sends of a cell: tokens to the first stage, labels to the last."""
        manifest = self._prepared.manifest
        is_known = wanted.task == self._task and wanted.cell < manifest.microbatches
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
