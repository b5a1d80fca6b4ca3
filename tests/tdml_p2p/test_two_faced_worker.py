"""A worker claims true results and sends its neighbours others, among real peers: the auditors find out."""

from pathlib import Path
from typing import Any

import pytest
import trio
from train_kit import Client, settings, swarm

from tdml_p2p.swarm import service
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.messages import Activation, Message
from trainer.payloads import pack, unpack

pytestmark = [pytest.mark.trio, pytest.mark.slow]


class TwoFaced(SwarmTransport):
    """Sends activations with the other sign from step 2 on."""

    liars: frozenset[str] = frozenset()

    async def send(self, to: str, message: Message) -> None:
        if isinstance(message, Activation) and message.step >= 2 and self.peer in TwoFaced.liars:
            message = Activation(*message_place(message), pack(-unpack(message.payload)))
        await super().send(to, message)


def message_place(message: Activation) -> tuple[int, int, int, int]:
    return message.generation, message.step, message.cell, message.stage


async def test_a_worker_whose_neighbour_is_sent_another_result_than_it_claims_is_not_paid_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the third occasion that costs the seat (`tests/attacks/test_withheld_tensors.py`)."""
    monkeypatch.setattr(service, "SwarmTransport", TwoFaced)
    train = settings(tmp_path, steps=400, microbatches=2, save_every=0)
    happened: list[tuple[str, str]] = []

    def on_event(_: Client, event: dict[str, Any]) -> None:
        if event["event"] == "formed":
            TwoFaced.liars = frozenset(event["stages"][0])

    async with swarm(tmp_path, workers=2, judges=3) as (founder, *_), trio.open_nursery() as nursery:
        client = Client(train, founder.invite, on_event)
        async with founder.engine.subscribe() as blocks:
            nursery.start_soon(client.run)
            with trio.fail_after(120):
                async for block in blocks:
                    happened += [(event.kind, str(event.data.get("worker"))) for event in block.events]
                    if [kind for kind, _ in happened].count("withheld") >= 2:
                        break
        nursery.cancel_scope.cancel()
    assert {worker for kind, worker in happened if kind in ("withheld", "disputed")} == TwoFaced.liars
    assert not {"slashed", "charged", "convicted", "faulted"} & {kind for kind, _ in happened}
