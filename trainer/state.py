"""State of one stage after a step: flat fp32 weights and moments, their root, and the ring of kept states."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import msgspec
import torch
from blake3 import blake3
from torch import Tensor

from trainer.base_weights import filled
from trainer.content import Address, address_of
from trainer.errors import StageError, StageReason
from trainer.layout import TensorSpec
from trainer.manifest import TaskManifest
from trainer.stage import stage_layout
from trainer.tensors import buffer_of, vector_of

__all__ = [
    "StageState",
    "StateManifest",
    "StateRing",
    "decode_state_manifest",
    "initial_state",
    "restored_state",
    "state_of_weights",
]


class StateManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step and the content addresses of weights and moments; the address of its bytes is the state root."""

    step: int
    weights: Address
    m: Address
    v: Address

    def encode(self) -> bytes:
        """Return the canonical bytes."""
        return msgspec.msgpack.encode(self)

    def root(self) -> bytes:
        """Return the 32-byte state root."""
        return address_of(self.encode())


def decode_state_manifest(data: bytes, root: bytes) -> StateManifest:
    """Return the state manifest that `root` names; raise `StageError` if `data` is not it."""
    if len(data) > 256 or address_of(data) != root:
        raise StageError(StageReason.WRONG_STATE, "The state manifest does not have the promised root.")
    try:
        return msgspec.msgpack.decode(data, type=StateManifest)
    except msgspec.DecodeError as error:
        raise StageError(StageReason.WRONG_STATE, f"The state manifest cannot be read: {error}.") from None


@dataclass(frozen=True, eq=False)
class StageState:
    """Weights and moments (flat fp32, never written to again) after `step` optimiser steps."""

    step: int
    weights: Tensor
    m: Tensor
    v: Tensor

    @cached_property
    def manifest(self) -> StateManifest:
        """Step and content addresses (computed once)."""
        return StateManifest(self.step, *(address_of(buffer) for buffer in self.buffers()))

    @property
    def root(self) -> bytes:
        """The 32-byte state root."""
        return self.manifest.root()

    @property
    def bytes(self) -> int:
        """Memory that the three vectors take."""
        return sum(len(buffer) for buffer in self.buffers())

    def buffers(self) -> tuple[memoryview, memoryview, memoryview]:
        """Return the raw bytes of weights, m and v: the blobs that the state manifest names."""
        return buffer_of(self.weights), buffer_of(self.m), buffer_of(self.v)


def restored_state(manifest: StateManifest, size: int, fetch: Callable[[bytes], bytes | memoryview]) -> StageState:
    """Return the state that a verified `manifest` names, of `size` parameters.

    `fetch` returns the blob of an address; raise `StageError` when a blob is not the one named.
    """
    vectors = []
    for address in (manifest.weights, manifest.m, manifest.v):
        data = fetch(address)
        if len(data) != 4 * size or address_of(data) != address:
            raise StageError(StageReason.WRONG_STATE, "A part of the state is not the one that its root names.")
        vectors.append(vector_of(data, size))
    return StageState(manifest.step, *vectors)


def initial_state(manifest: TaskManifest, index: int) -> StageState:
    """Return the state of stage `index` before the first step, drawn from the manifest's seed.

    Every tensor has its own generator, so the values do not depend on the number of stages. Raise `StageError`
    if the task starts from given states instead.
    """
    if manifest.initial:
        raise StageError(StageReason.WRONG_STATE, "This task starts from given states, not from its seed.")
    layout = stage_layout(manifest, index)
    weights = torch.empty(layout.total, dtype=torch.float32)
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        _draw(weights[start:stop], tensor, manifest.seed)
    return _fresh(weights)


def _draw(values: Tensor, tensor: TensorSpec, seed: int) -> None:
    if not tensor.deviation:
        values.fill_(tensor.constant)
        return
    name = blake3(tensor.name.encode() + seed.to_bytes(8, "big"), derive_key_context="tdml 1 initial weights")
    generator = torch.Generator().manual_seed(int.from_bytes(name.digest(8), "big") >> 1)
    # uniform, because torch.randn differs between CPU models and torch.rand does not
    torch.rand(values.shape, generator=generator, out=values)
    values.sub_(0.5).mul_(2 * sqrt(3) * tensor.deviation)


def state_of_weights(manifest: TaskManifest, index: int, tensors: Mapping[str, Tensor]) -> StageState:
    """Return the state before the first step from the whole model's state dict; raise `StageError`."""
    return _fresh(filled(stage_layout(manifest, index), tensors))


def _fresh(weights: Tensor) -> StageState:
    return StageState(0, weights, torch.zeros_like(weights), torch.zeros_like(weights))


class StateRing:
    """The newest `depth` states of one stage in order of step, so that any of them can be audited."""

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError("a ring keeps at least one state")
        self.depth = depth
        self._states: dict[int, StageState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[StageState]:
        return iter(self._states.values())

    def __contains__(self, step: int) -> bool:
        return step in self._states

    @property
    def newest(self) -> StageState:
        """The state of the latest step; raise `StageError` if the ring is empty."""
        if not self._states:
            raise StageError(StageReason.WRONG_STATE, "The stage has no state yet.")
        return next(reversed(self._states.values()))

    @property
    def is_full(self) -> bool:
        """Whether another state would push the oldest out."""
        return len(self._states) >= self.depth

    @property
    def bytes(self) -> int:
        """Memory that the kept states take."""
        return sum(state.bytes for state in self._states.values())

    def push(self, state: StageState) -> None:
        """Keep the state that follows the newest, pushing out the oldest; raise `StageError` for a gap."""
        if self._states and state.step != self.newest.step + 1:
            raise StageError(StageReason.WRONG_STATE, f"State {state.step} does not follow state {self.newest.step}.")
        self._states[state.step] = state
        if len(self._states) > self.depth:
            del self._states[next(iter(self._states))]

    def at(self, step: int) -> StageState:
        """Return the state after `step`; raise `StageError` if it is not kept."""
        state = self._states.get(step)
        if state is None:
            raise StageError(StageReason.WRONG_STATE, f"The state after step {step} is not kept.")
        return state

    def restore(self, step: int) -> StageState:
        """Forget all states after `step` and return that of `step`; raise `StageError` if it is not kept."""
        state = self.at(step)
        self._states = {kept: value for kept, value in self._states.items() if kept <= step}
        return state

    def reset(self, state: StageState) -> None:
        """Forget every state and keep `state` alone (a joiner's or a resumed stage's)."""
        self._states = {state.step: state}

    def settle(self, step: int) -> None:
        """Forget the states before `step`: no audit will ask for them; the newest always stays."""
        newest = self.newest.step
        self._states = {kept: value for kept, value in self._states.items() if kept >= min(step, newest)}
