"""What the client answers about a cell: the tokens and labels that it sends, signed, and nothing else."""

from typing import Any, cast

import pytest

from tdml_p2p.swarm import feed as module
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.inputs import InputsRefused, Senders, Wanted, checked
from tdml_p2p.swarm.preparation import Prepared
from tests.tdml_p2p.swarm.session_kit import CLIENT, CLIENT_KEY, TASK
from tests.trainer.swarm_kit import batches_of, manifest_of
from trainer.content import address_of
from trainer.state import initial_state
from trainer.tensors import buffer_of

CLIENT_ONLY = Senders(frozenset([CLIENT]), frozenset([CLIENT]))


def feed_of(stages: int, is_given: bool = False) -> ClientFeed:
    """Return a client's feed, of a run that was given its first states if asked for."""
    manifest = manifest_of(stages=stages, steps=4, microbatches=2, layers=3)
    states = tuple(initial_state(manifest, stage) for stage in range(stages)) if is_given else ()
    return ClientFeed(CLIENT_KEY, TASK, Prepared(manifest, batches_of(manifest), cast(Any, None), states=states))


def wanted(stage: int, step: int = 1, cell: int = 0, generation: int = 0, task: bytes = TASK) -> Wanted:
    return Wanted(task, generation, step, stage, cell)


def test_tokens_go_to_the_first_stage_and_labels_to_the_last() -> None:
    feed = feed_of(3)
    first, middle, last = (feed.describe(wanted(stage)) for stage in range(3))
    assert first is not None
    assert last is not None
    assert (first.x is None, first.gy is None) == (False, True)
    assert middle is None
    assert (last.x is None, last.gy is None) == (True, False)


def test_a_single_stage_gets_both() -> None:
    found = feed_of(1).describe(wanted(0))
    assert found is not None
    assert found.x is not None
    assert found.gy is not None


@pytest.mark.parametrize(("step", "cell", "generation"), [(1, 0, 0), (4, 1, 0), (2, 1, 3)])
def test_what_is_described_is_signed_and_served(step: int, cell: int, generation: int) -> None:
    feed = feed_of(1)
    asked = wanted(0, step, cell, generation)
    found = feed.describe(asked)
    assert found is not None
    assert checked(asked, found, manifest_of(stages=1, steps=4, microbatches=2, layers=3), CLIENT_ONLY) == found
    batch = batches_of(manifest_of(stages=1, steps=4, microbatches=2, layers=3)).batch(step, cell)
    for part, tensor in ((found.x, batch.tokens), (found.gy, batch.labels)):
        assert part is not None
        assert part.address == address_of(buffer_of(tensor))
        assert feed.blob(part.address) == buffer_of(tensor)


def test_an_input_of_one_cell_is_no_proof_for_another() -> None:
    found = feed_of(1).describe(wanted(0, step=1))
    assert found is not None
    manifest = manifest_of(stages=1, steps=4, microbatches=2, layers=3)
    for other in (wanted(0, step=2), wanted(0, cell=1), wanted(0, generation=1), wanted(0, task=bytes(32))):
        with pytest.raises(InputsRefused, match="is false"):
            checked(other, found, manifest, CLIENT_ONLY)
    with pytest.raises(InputsRefused, match="may not send"):
        checked(wanted(0), found, manifest, Senders(frozenset(), frozenset([CLIENT])))


@pytest.mark.parametrize(
    "asked",
    [
        *(wanted(0, step=0), wanted(0, step=5), wanted(0, cell=2), wanted(2), wanted(0, task=bytes(32))),
        *(wanted(2**31 - 1), wanted(0, cell=2**31 - 1), wanted(0, step=2**62)),
    ],
    ids=str,
)
def test_cells_that_the_task_does_not_have(asked: Wanted) -> None:
    assert feed_of(2).describe(asked) is None


def test_the_newest_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 4)
    feed = feed_of(1)
    addresses = []
    for step in (1, 2, 1, 3):
        found = feed.describe(wanted(0, step))
        assert found is not None
        assert found.x is not None
        assert found.gy is not None
        addresses += [found.x.address, found.gy.address]
    assert [feed.blob(address) is not None for address in addresses] == [*[True, True], *[False, False], *[True] * 4]


def test_the_states_of_the_client_are_served() -> None:
    feed = feed_of(2, is_given=True)
    for stage in range(2):
        root, holders = feed.source(0, stage, CLIENT)
        state = initial_state(manifest_of(stages=2, steps=4, microbatches=2, layers=3), stage)
        assert (root, holders) == (state.root, (CLIENT,))
        assert feed.blob(root) == state.manifest.encode()
        for address, buffer in zip(
            (state.manifest.weights, state.manifest.m, state.manifest.v), state.buffers(), strict=True
        ):
            assert feed.blob(address) == buffer


def test_a_client_without_the_states_of_that_step_names_nobody() -> None:
    assert feed_of(2, is_given=True).source(1, 0, CLIENT) == (b"", ())
    assert feed_of(2).source(0, 0, CLIENT) == (b"", ())
    assert feed_of(2).blob(bytes(32)) is None
