import pytest
import torch
from training_samples import small_manifest

from trainer.checkpoint import whole_tensors
from trainer.errors import StageError, StageReason
from trainer.state import (
    StageState,
    StateRing,
    decode_state_manifest,
    initial_state,
    restored_state,
    state_of_weights,
)


def state(step: int) -> StageState:
    return StageState(step, torch.full((8,), float(step)), torch.zeros(8), torch.ones(8))


def test_the_root_follows_every_part_and_the_step() -> None:
    one = torch.ones(8)
    variants = [
        state(3),
        state(4),
        StageState(4, state(3).weights, torch.zeros(8), one),
        StageState(3, state(3).weights, one, one),
        StageState(3, state(3).weights, torch.zeros(8), one * 2),
    ]
    assert len({variant.root for variant in variants}) == len(variants)
    assert state(3).root == state(3).root
    assert state(3).bytes == 96


def test_a_state_is_fetched_from_its_root_alone() -> None:
    original = initial_state(small_manifest(2), 1)
    blobs = dict(zip(original.manifest.__struct_fields__[1:], original.buffers(), strict=True))
    named = {getattr(original.manifest, name): bytes(blob) for name, blob in blobs.items()}
    manifest = decode_state_manifest(original.manifest.encode(), original.root)
    fetched = restored_state(manifest, original.weights.numel(), named.__getitem__)
    assert fetched.root == original.root
    assert torch.equal(fetched.weights, original.weights)


def test_a_poisoned_state_is_refused() -> None:
    original = state(3)
    with pytest.raises(StageError):
        decode_state_manifest(state(4).manifest.encode(), original.root)
    with pytest.raises(StageError):
        decode_state_manifest(b"\xc1", original.root)
    with pytest.raises(StageError) as caught:
        restored_state(original.manifest, 8, lambda address: bytes(32))
    assert caught.value.reason == StageReason.WRONG_STATE


def test_weights_given_by_name_make_the_same_state() -> None:
    manifest = small_manifest(2)
    states = [initial_state(manifest, index) for index in range(2)]
    tensors = whole_tensors(manifest, states)
    assert state_of_weights(manifest, 1, tensors).root == states[1].root
    with pytest.raises(StageError):
        state_of_weights(manifest, 1, {})
    with pytest.raises(StageError):
        initial_state(small_manifest(initial=("ab" * 32,)), 0)


def test_the_ring_keeps_the_newest_states_and_can_go_back() -> None:
    ring = StateRing(3)
    with pytest.raises(StageError):
        _ = ring.newest
    for step in range(5):
        ring.push(state(step))
    assert [kept.step for kept in ring] == [2, 3, 4]
    assert ring.is_full
    assert ring.bytes == 3 * 96
    with pytest.raises(StageError):
        ring.push(state(6))
    with pytest.raises(StageError):
        ring.at(1)
    assert ring.restore(3).step == 3
    assert [kept.step for kept in ring] == [2, 3]
    ring.settle(3)
    assert [kept.step for kept in ring] == [3]
    ring.settle(9)
    assert ring.newest.step == 3
    ring.reset(state(7))
    assert 7 in ring
    assert len(ring) == 1
