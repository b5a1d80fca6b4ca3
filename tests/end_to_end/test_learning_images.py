"""Images through real peer processes: the digits are learnt, audited, and the folder opens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes_kit import LOCAL, events_on_chain, finished, losses, network, undisturbed

from tdml_p2p.config import TrainConfig
from tdml_p2p.demo.processes import child
from trainer.image_classes import open_classes
from trainer.images import Form, read_images

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]


async def test_digits_are_learnt_by_a_swarm_as_by_one_process_and_every_audit_passes(tmp_path: Path) -> None:
    train = TrainConfig(
        model="resnet-tiny",
        data=(Path("digits"),),
        out=tmp_path / "out",
        steps=30,
        batch=8,
        microbatches=8,
        learning_rate=0.003,
        validation="0.2",
    )
    events: list[dict[str, Any]] = []
    async with network(tmp_path, 5, 4) as swarm:
        arguments = [
            "train", "--home", str(swarm.network.client_home), *LOCAL, "--join", swarm.invite, "--model", train.model,
            "--data", "digits", "--out", str(train.out), "--steps", "30", "--batch", "8", "--microbatches", "8",
            "--learning-rate", "0.003", "--validation", "0.2", "--eval-every", "15", "--audit-rate", "0.2",
        ]  # fmt: skip
        async with child("client", "cli.peer", arguments, tmp_path / "client.txt") as running:
            assert await finished(running, events) == 0
    found, expected = losses(events), undisturbed(train)
    assert found[:6] == pytest.approx(expected[:6], rel=1e-5)
    # from there on training itself magnifies how sums are rounded: one process differs from itself as much when its
    # first weights are changed by 1e-7
    assert found == pytest.approx(expected, rel=0.05)
    measured = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
    assert sorted(measured) == [15, 30]
    assert measured[30] < measured[15]
    kinds = [kind for kind, _ in events_on_chain(train.out / "chain.db")]
    assert kinds.count("passed") > 10
    assert any("first" in data for kind, data in events_on_chain(train.out / "chain.db") if kind == "drawn")
    assert not {"disputed", "convicted", "evicted", "slashed"} & set(kinds)
    assert accuracy(train.out) > 0.9


def accuracy(folder: Path) -> float:
    """Return the share of the digits that were not trained on which the saved model tells right."""
    from transformers import AutoModelForImageClassification

    from trainer.image_data import divided

    classes = open_classes(folder)
    images = read_images((Path("digits"),), Form(classes.size, len(classes.mean)), folder)
    _, kept = divided(images, 0.2)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(classes.normalised(images.pixels[kept]))).logits
    return float((logits.argmax(1).numpy() == images.labels[kept]).mean())
