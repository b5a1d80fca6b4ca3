"""What a seat asks of memory: the parts that bench.memory measures, for the seat that the chain may draw."""

from math import prod

import pytest
from msgspec.structs import replace

from tests.trainer.image_samples import resnet_manifest
from tests.trainer.training_samples import small_manifest
from trainer.footprint import available_bytes, footprint, largest, why_not
from trainer.manifest import complete
from trainer.stage import stage_layout

MANIFEST = small_manifest(stages=2)


def test_the_parts_add_up() -> None:
    weights = 4 * stage_layout(MANIFEST, 0).total
    activation = 4 * prod(MANIFEST.boundary(1))
    assert activation == 4 * MANIFEST.batch * MANIFEST.sequence * MANIFEST.hidden
    found = footprint(MANIFEST, 0)
    assert found.step == -(-MANIFEST.microbatches // MANIFEST.replicas) * (weights + 3 * activation)
    assert found.resident == weights * (1 + 3 * (2 + MANIFEST.audit.depth) + 2)
    assert found.total == found.step + found.resident


def test_replicas_share_a_step_and_the_largest_seat_counts() -> None:
    shared = replace(MANIFEST, replicas=MANIFEST.microbatches)
    assert footprint(shared, 0).step * MANIFEST.microbatches == footprint(replace(MANIFEST, replicas=1), 0).step
    whole = complete(replace(MANIFEST, stages=1, cuts=()))
    assert largest(whole).total > largest(MANIFEST).total


def test_a_machine_is_told_why_it_is_too_small() -> None:
    need = largest(MANIFEST)
    assert why_not(MANIFEST, need.total, need.total) is None
    assert why_not(MANIFEST, 0, None) is None
    assert "--memory" in str(why_not(MANIFEST, need.total - 1, None))
    assert "other seats" in str(why_not(MANIFEST, need.total, None, held=1))
    assert why_not(MANIFEST, need.total + 1, None, held=1) is None
    assert "free" in str(why_not(MANIFEST, need.total, need.total - 1))


def test_without_a_bound_of_its_own_a_step_has_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.footprint.DEFAULT_MEMORY_LIMIT", largest(MANIFEST).step - 1)
    assert "usual" in str(why_not(MANIFEST, 0, None))
    assert why_not(MANIFEST, largest(MANIFEST).total, None) is None
    assert (available_bytes() or 1) > 0


def test_images_count_by_the_shape_at_the_widest_cut() -> None:
    manifest = resnet_manifest(2)
    widest = max(prod(manifest.boundary(done)) for done in range(manifest.layers + 1))
    cells = -(-manifest.microbatches // manifest.replicas)
    assert footprint(manifest, 1).step == cells * 4 * (stage_layout(manifest, 1).total + 3 * widest)
