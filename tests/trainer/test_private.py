"""A private run: the client's two ends in its own process train the same model, and what they hold stays there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
import trio
from swarm_kit import CLIENT, TIED, Kit, batches_of, held_back, in_virtual_time, manifest_of, relative

from tests.trainer.image_samples import resnet_manifest
from trainer.adapters import LoraSettings
from trainer.coordinator import Coordinator, Members
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts, NotValidated, PeerLeft, Rerouted, StepDone
from trainer.ends import Ends, EndsGovernor, drawn_ends, end_names, keeping
from trainer.errors import ManifestReason
from trainer.local import LocalTrainer, whole
from trainer.manifest import ManifestError, TaskManifest, complete, decode_manifest, encode_manifest
from trainer.messages import (
    Activation,
    CellDone,
    Gradient,
    Labels,
    Message,
    Prepare,
    Probe,
    Reduce,
    Relay,
    Reroute,
    Tied,
    Tokens,
    payload_of,
)
from trainer.payloads import pack
from trainer.run import joined
from trainer.stage import build_stage
from trainer.state import StageState, initial_state
from trainer.tensors import buffer_of
from trainer.transport import Faults, InMemoryHub
from trainer.worker_ports import StateUnavailable, T, WorkerConfig, WorkerPorts

LAYERS = 3
STEPS = 5
TINY: dict[str, int | float | bool | str] = {**TIED, "n_layer": LAYERS}


def private_manifest(stages: int = 2, family: str = "llama", **changes: Any) -> TaskManifest:
    """Return a task of `stages` seated stages between the client's two."""
    base = msgspec.structs.replace(manifest_of(1, STEPS, layers=LAYERS), private=True, stages=stages + 2, cuts=())
    if family == "gpt2":
        base = msgspec.structs.replace(base, family=family, config=TINY)
    return complete(msgspec.structs.replace(base, **changes))


@dataclass
class PrivateKit(Kit):
    """A kit whose client holds the ends; only the stages between them are workers of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pieces = 0
        self.slow: dict[int, float] = {}
        names = self.governor.members.stages
        self.governor.members = Members(0, 0, names[1:-1])
        self.hub = InMemoryHub(self.faults)
        self.ports = WorkerPorts(self.compute_ends, self.fetch_state, self.on_committed)
        depth = 8
        seats = [WorkerConfig(CLIENT, build_stage(self.manifest, i), self.manifest, depth) for i in self.end_stages]
        self.ends = Ends(seats, self.hub.join(CLIENT), self.ports)
        self.workers.update(self.ends.workers)
        ports = CoordinatorPorts(
            EndsGovernor(self.governor, self.ends),
            batches_of(self.manifest),
            lambda event: self.report(event),
            self.ends.fetching(self.fetch_state),
            self.source,
            validation=held_back(self.manifest),
        )
        config = CoordinatorConfig(self.manifest, self.patience, self.eval_every)
        self.coordinator = Coordinator(config, self.ends.transport, ports)

    @property
    def end_stages(self) -> tuple[int, int]:
        return 0, self.manifest.stages - 1

    async def compute_ends(self, work: Callable[[], T], /) -> T:
        self.pieces += 1
        await trio.sleep(self.slow.get(self.pieces, 0.01))
        return work()

    async def on_committed(self, record: Any) -> None:
        self.records.append((end_names(CLIENT)[record.stage > 0], record))

    async def train(self) -> tuple[StageState, ...]:
        async with trio.open_nursery() as self.nursery:
            self.nursery.start_soon(self.ends.run)
            for stage, peers in zip(self.manifest.seated, self.governor.members.stages, strict=True):
                for peer in peers:
                    self.start(peer, stage)
            states = await self.coordinator.run()
            self.nursery.cancel_scope.cancel()
        return states

    @property
    def left(self) -> list[tuple[str, Message]]:
        """Every message that left the client, with its receiver."""
        return [(to, message) for sender, to, message in self.hub.log if sender == CLIENT]

    @property
    def validations(self) -> dict[int, float | None]:
        return {e.step: e.validation for e in self.events if isinstance(e, StepDone) and e.validation is not None}


def trained(kit: PrivateKit) -> tuple[StageState, ...]:
    torch.set_num_threads(1)
    outcome: list[tuple[StageState, ...]] = []

    async def train() -> None:
        outcome.append(await kit.train())

    in_virtual_time(train)
    kit.check_exactly_once()
    return outcome[0]


def alone(manifest: TaskManifest, given: tuple[StageState, ...] = ()) -> LocalTrainer:
    """Return what one process makes of the same run."""
    start = joined(manifest, given) if given else None
    trainer = LocalTrainer(manifest, batches_of(manifest), start)
    for _ in range(manifest.steps):
        trainer.advance()
    return trainer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (1, 2), (2, 2)])
def test_parameters_equal_those_of_one_process(family: str, stages: int, replicas: int) -> None:
    manifest = private_manifest(stages, family)
    assert bool(manifest.tied) == (family == "gpt2")
    kit = PrivateKit(manifest, replicas, eval_every=STEPS)
    states = trained(kit)
    reference = alone(manifest)
    found = joined(manifest, states)
    assert relative(found.weights, reference.state.weights) < 1e-5
    assert relative(found.m, reference.state.m) < 1e-4
    kept = held_back(manifest)
    assert kit.validations == {STEPS: pytest.approx(reference.evaluate(kept), rel=1e-5)}
    assert not any(worker.refused for worker in kit.workers.values())
    assert not kit.coordinator.refused


@pytest.mark.parametrize("kept", [0, 1])
def test_images_and_their_classes_stay_with_the_client_too(kept: int) -> None:
    manifest = keeping(resnet_manifest(3, STEPS, private=True, cuts=()), kept)
    kit = PrivateKit(manifest, 2, eval_every=STEPS)
    states = trained(kit)
    reference = alone(manifest)
    assert relative(joined(manifest, states).weights, reference.state.weights) < 1e-5
    assert kit.validations == {STEPS: pytest.approx(reference.evaluate(held_back(manifest)), rel=1e-5)}
    sent = b"".join(bytes(payload.data) for _, message in kit.left for payload in payload_of(message))
    cells = [batches_of(manifest).batch(1, cell) for cell in range(manifest.microbatches)]
    assert not any(bytes(buffer_of(tensor)) in sent for cell in cells for tensor in cell)
    assert not {type(message) for _, message in kit.left} & {Tokens, Labels, Probe}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ends_with_layers_of_their_own_train_the_same_model(family: str) -> None:
    manifest = keeping(private_manifest(1, family), 1)
    assert manifest.cuts == (1, 1, 1)
    kit = PrivateKit(manifest, 2)
    states = trained(kit)
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5
    for kept in (2, -1):
        with pytest.raises(ManifestError, match="cannot leave 1 stages") as caught:
            keeping(manifest, kept)
        assert caught.value.reason is ManifestReason.NOT_PRIVATE


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_run_repeats_bit_for_bit(compression: str) -> None:
    kits = [PrivateKit(private_manifest(2, "gpt2", compression=compression)) for _ in range(2)]
    first, second = (trained(kit) for kit in kits)
    assert [state.root for state in first] == [state.root for state in second]
    assert kits[0].losses == kits[1].losses
    assert kits[0].losses[-1] < kits[0].losses[0]


def secrets_of(manifest: TaskManifest) -> list[bytes]:
    """Return the bytes of all tokens and labels of a run, row by row."""
    batches = batches_of(manifest)
    kept = held_back(manifest)
    found = [batches.batch(step, cell) for step in range(1, STEPS + 1) for cell in range(manifest.microbatches)]
    found += [kept.batch(index) for index in range(kept.count)]
    return [bytes(buffer_of(row)) for batch in found for tensor in batch for row in tensor]


def test_no_token_no_label_and_no_gradient_of_the_embedding_leaves_the_client() -> None:
    manifest = private_manifest(2, "gpt2")
    kit = PrivateKit(manifest, replicas=2, eval_every=2)
    trained(kit)
    assert set(kit.validations) == {2, 4, 5}
    kinds = {type(message) for _, message in kit.left}
    assert {Activation, Gradient, Relay, Reduce} <= kinds
    assert not kinds & {Tokens, Labels, Probe, Tied, CellDone}
    sent = b"".join(bytes(payload.data) for _, message in kit.left for payload in payload_of(message))
    assert not any(row in sent for row in secrets_of(manifest))
    # the workers know the client by its one name
    assert not any(name in repr(message) for name in end_names(CLIENT) for _, message in kit.left)


def test_what_must_stay_raises_if_it_is_sent_to_a_worker() -> None:
    kit = PrivateKit(private_manifest(1), 1)
    batch = batches_of(kit.manifest).batch(1, 0)

    async def send(message: Message) -> None:
        await kit.ends.carry(CLIENT, "s1r0", message)

    for message in (
        Tokens(0, 1, 0, pack(batch.tokens)),
        Labels(0, 1, 0, pack(batch.labels)),
        Probe(0, 1, 0, ("s1r0",), (*pack(batch.tokens), *pack(batch.labels))),
        Tied(0, 1, 1, 0, pack(torch.zeros(4))),
    ):
        with pytest.raises(ValueError, match="must not leave"):
            trio.run(send, message)
    assert not kit.hub.log


@pytest.mark.parametrize(
    ("of", "before"), [(Activation, True), (Activation, False), (Gradient, True), (Gradient, False)]
)
def test_a_worker_that_dies_in_a_step_is_replaced(of: type[Message], before: bool) -> None:
    manifest = private_manifest(1, "gpt2")
    kit = PrivateKit(manifest, 2, Faults().crash("s1r1", after=3, of=of, before=before))
    states = trained(kit)
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5
    rerouted = [event for event in kit.events if isinstance(event, Rerouted)]
    assert {event.peer for event in rerouted} == {"s1r1"}
    assert {event.stage for event in rerouted} == {1}


@pytest.mark.parametrize("piece", [30, 31, 33])
def test_an_end_that_is_slow_is_asked_again_and_keeps_its_cells(piece: int) -> None:
    manifest = private_manifest(1)
    kit = PrivateKit(manifest, 2)
    kit.slow = {piece: 100.0}
    states = trained(kit)
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5
    named = [message.peer for _, message in kit.left if isinstance(message, Reroute)]
    assert CLIENT in named
    assert not set(named) & set(end_names(CLIENT))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_link_to_the_client_that_breaks_and_mends_costs_no_more_than_time(replicas: int) -> None:
    manifest = private_manifest(1, "gpt2")
    kit = PrivateKit(manifest, replicas)
    kit.slow = {33: 30.0, 34: 30.0}

    async def break_and_mend() -> None:
        await trio.sleep(1.0)
        kit.hub.cut("s1r0", CLIENT)
        await trio.sleep(5.0)
        kit.faults.mend("s1r0", CLIENT)

    start = kit.start
    kit.start = lambda peer, stage: (  # type: ignore[method-assign]
        start(peer, stage),
        kit.nursery.start_soon(break_and_mend) if peer == "s1r0" and kit.nursery else None,
    )[0]
    states = trained(kit)
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5
    assert [event.peer for event in kit.events if isinstance(event, PeerLeft)][:1] == ["s1r0"]


def test_a_rollback_restores_the_ends_too() -> None:
    manifest = private_manifest(1, "gpt2")
    kit = PrivateKit(manifest, 2)

    def convict() -> None:
        kit.governor.members = Members(1, 1, (("s1r0",),))

    kit.governor.hooks[4] = convict
    states = trained(kit)
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1, 2, 3, 2, 3, 4, 5]
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5


def test_a_rollback_beyond_what_the_ends_hold_ends_the_run() -> None:
    """As when a client goes on from an unverified checkpoint, and a verdict takes the swarm back before it."""
    manifest = private_manifest(1)
    kit = PrivateKit(manifest, 2)

    def convict() -> None:
        kit.ends.forget(3)
        kit.governor.members = Members(1, 1, (("s1r0",),))

    kit.governor.hooks[4] = convict
    with pytest.raises(BaseExceptionGroup) as caught:
        trained(kit)
    assert caught.group_contains(StateUnavailable, match="after step 1")


def test_the_ends_are_drawn_from_a_seed_that_nobody_else_knows() -> None:
    manifest = private_manifest(1, "gpt2")
    first, last = drawn_ends(manifest, 77)
    kit = PrivateKit(manifest, 1)
    kit.given = (first, initial_state(manifest, 1), last)
    kit.coordinator = coordinator_with(kit, (first, last))
    states = trained(kit)
    reference = alone(manifest, kit.given)
    assert relative(joined(manifest, states).weights, reference.state.weights) < 1e-5
    public = alone(manifest)
    assert relative(public.state.weights, reference.state.weights) > 0.1
    # workers drew their stage from the manifest's seed: nothing but the ends was given
    asked = [message for to, message in kit.left if isinstance(message, Prepare) and to == "s1r0"]
    assert [(message.root, message.holders) for message in asked] == [(b"", ())]


def coordinator_with(kit: PrivateKit, ends: tuple[StageState, ...]) -> Coordinator:
    """Return the kit's coordinator, the client being the holder of the ends only."""

    def source(step: int, stage: int) -> tuple[bytes, tuple[str, ...]]:
        if step or stage not in kit.end_stages:
            return b"", ()
        return ends[stage > 0].root, (CLIENT,)

    config = CoordinatorConfig(kit.manifest, kit.patience)
    ports = CoordinatorPorts(
        EndsGovernor(kit.governor, kit.ends),
        batches_of(kit.manifest),
        kit.events.append,
        kit.ends.fetching(kit.fetch_state),
        source,
    )
    return Coordinator(config, kit.ends.transport, ports)


def test_strangers_cannot_pose_as_the_client_and_false_probes_get_no_labels() -> None:
    manifest = private_manifest(1)
    kit = PrivateKit(manifest, 1)
    batch = batches_of(manifest).batch(1, 0)
    hidden = torch.zeros(manifest.batch, manifest.sequence, manifest.hidden)

    def attack() -> None:
        for message in (
            Tokens(0, 2, 0, pack(batch.tokens)),
            Prepare(0, 0, 0, b"", ()),
            Probe(0, 1, 0, (CLIENT, "s1r0", CLIENT), (*pack(batch.tokens), *pack(batch.labels))),
            Relay(0, 1, 0, 1, (CLIENT, "s1r0", CLIENT), (*pack(hidden), *pack(batch.labels))),
        ):
            kit.hub.inject("s1r0", CLIENT, message)

    kit.governor.hooks[2] = attack
    states = trained(kit)
    assert relative(joined(manifest, states).weights, alone(manifest).state.weights) < 1e-5
    assert sum(kit.coordinator.refused.values()) == 4
    assert not any(worker.refused for worker in kit.ends.workers.values())


def test_a_worker_that_dies_while_it_measures_costs_only_the_measure() -> None:
    kit = PrivateKit(private_manifest(1), 2, Faults().crash("s1r1", after=1, of=Relay, before=True), eval_every=2)
    trained(kit)
    assert [event.step for event in kit.events if isinstance(event, NotValidated)] == [2]
    assert set(kit.validations) == {4, 5}


def test_the_manifest_counts_the_clients_ends_and_gives_them_no_layers() -> None:
    manifest = private_manifest(2)
    assert (manifest.stages, manifest.cuts, list(manifest.seated)) == (4, (0, 1, 2, 0), [1, 2])
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert whole(manifest) == manifest_of(1, STEPS, layers=LAYERS)
    assert private_manifest(1, cuts=(1, 1, 1)).stage(1).first == 1


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"stages": 2}, ManifestReason.NOT_PRIVATE, "between the client's two ends"),
        ({"stages": 1}, ManifestReason.NOT_PRIVATE, "between the client's two ends"),
        ({"stages": LAYERS + 3}, ManifestReason.TOO_MANY_STAGES, f"{LAYERS} layers cannot be cut into {LAYERS + 1}"),
        ({"stages": 3, "cuts": (2, 0, 1)}, ManifestReason.BAD_CUTS, "cuts"),
        ({"stages": 3, "cuts": (0, LAYERS)}, ManifestReason.BAD_CUTS, "cuts"),
        ({"stages": 3, "lora": LoraSettings(4, 4, ("q_proj",), ())}, ManifestReason.NOT_PRIVATE, "Adapters"),
    ],
)
def test_a_run_that_cannot_be_private_is_refused(changes: dict[str, Any], reason: ManifestReason, said: str) -> None:
    with pytest.raises(ManifestError, match=said) as caught:
        complete(msgspec.structs.replace(manifest_of(1, layers=LAYERS), private=True, **{"cuts": (), **changes}))
    assert caught.value.reason is reason
