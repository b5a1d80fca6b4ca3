import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_samples import CONFIG, small_manifest

from trainer.errors import ManifestError
from trainer.families.base import Costs
from trainer.image_settings import ImageSettings
from trainer.manifest import (
    MAX_MANIFEST_BYTES,
    AuditSettings,
    ManifestReason,
    OptimizerSettings,
    TaskManifest,
    balanced_cuts,
    complete,
    decode_manifest,
    encode_manifest,
)
from trainer.presets import PRESETS, preset_of


def draft(config: dict[str, object] | None = None, **changes: object) -> TaskManifest:
    base = TaskManifest("llama", {**CONFIG, **(config or {})}, sequence=16)
    return msgspec.structs.replace(base, **changes)


LARGE: dict[str, int] = {
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
"""Two stages of more than 2**28 parameters each."""


def test_a_large_stage_needs_no_large_message_with_one_replica_or_a_small_encoding() -> None:
    complete(draft(LARGE, replicas=1))
    complete(draft(LARGE, replicas=2, compression="int8"))


def test_a_complete_manifest_survives_its_canonical_bytes() -> None:
    manifest = small_manifest(2)
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert b" " not in data
    assert list(msgspec.json.decode(data)) == sorted(msgspec.json.decode(data))
    assert manifest.address == decode_manifest(data).address


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (draft(family="gpt9"), ManifestReason.UNKNOWN_FAMILY),
        (draft(version=2), ManifestReason.UNKNOWN_VERSION),
        (draft(stages=5), ManifestReason.TOO_MANY_STAGES),
        (draft(stages=0), ManifestReason.BAD_SIZE),
        (draft(batch=0), ManifestReason.BAD_SIZE),
        (draft(steps=0), ManifestReason.BAD_SIZE),
        (draft(microbatches=1025), ManifestReason.BAD_SIZE),
        (draft(audit=AuditSettings(redundancy=2)), ManifestReason.BAD_REDUNDANCY),
        (draft(sequence=65), ManifestReason.SEQUENCE_TOO_LONG),
        (draft({"vocab_size": 1 << 20}, batch=4096), ManifestReason.CELL_TOO_LARGE),
        (draft(stages=2, cuts=(4, 0)), ManifestReason.BAD_CUTS),
        (draft(stages=2, cuts=(4,)), ManifestReason.BAD_CUTS),
        (draft(stages=2, cuts=(2, 3)), ManifestReason.BAD_CUTS),
        (draft(precision="fp8"), ManifestReason.BAD_PRECISION),
        (draft(initial=("zz",)), ManifestReason.BAD_ADDRESS),
        (draft(initial=("ab" * 32,) * 3), ManifestReason.BAD_START),
        (draft(start=3), ManifestReason.BAD_START),
        (draft(tokenizer=""), ManifestReason.BAD_ADDRESS),
        (draft(optimizer=OptimizerSettings(name="sgd")), ManifestReason.BAD_OPTIMIZER),
        (draft(optimizer=OptimizerSettings(beta1=1.0)), ManifestReason.BAD_OPTIMIZER),
        (draft(optimizer=OptimizerSettings(learning_rate=float("nan"))), ManifestReason.BAD_OPTIMIZER),
        (draft(optimizer=OptimizerSettings(clip=-1.0)), ManifestReason.BAD_OPTIMIZER),
        (
            draft(
                {
                    "hidden_size": 1 << 14,
                    "intermediate_size": 1 << 18,
                    "num_hidden_layers": 1024,
                    "num_attention_heads": 64,
                },
                batch=1,
            ),
            ManifestReason.BAD_SIZE,
        ),
        (draft(LARGE, replicas=2), ManifestReason.STAGE_TOO_LARGE),
        (draft({"surprise": 1}), ManifestReason.UNKNOWN_SETTING),
        (draft({"hidden_size": 0}), ManifestReason.BAD_CONFIG),
        (draft({"hidden_size": 65}), ManifestReason.BAD_CONFIG),
        (draft({"hidden_size": True}), ManifestReason.BAD_CONFIG),
        (draft({"hidden_size": 1 << 40}), ManifestReason.BAD_CONFIG),
        (draft({"num_key_value_heads": 3}), ManifestReason.BAD_CONFIG),
        (draft({"head_dim": 7}), ManifestReason.BAD_CONFIG),
        (draft({"hidden_act": "swish2"}), ManifestReason.BAD_CONFIG),
        (draft({"attention_bias": 0}), ManifestReason.BAD_CONFIG),
        (draft({"rope_theta": float("inf")}), ManifestReason.BAD_CONFIG),
        (draft({"rms_norm_eps": "small"}), ManifestReason.BAD_CONFIG),
    ],
)
def test_an_impossible_manifest_is_refused_by_name(bad: TaskManifest, reason: ManifestReason) -> None:
    with pytest.raises(ManifestError) as caught:
        complete(bad)
    assert caught.value.reason == reason
    assert caught.value.sentence.endswith(".")


def test_a_missing_setting_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        complete(TaskManifest("llama", {"hidden_size": 64, "num_attention_heads": 4}))
    assert caught.value.reason == ManifestReason.BAD_CONFIG


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", ManifestReason.UNREADABLE),
        (b"[1]", ManifestReason.UNREADABLE),
        (b"\xff" * 20, ManifestReason.UNREADABLE),
        (b"[" * 5000, ManifestReason.UNREADABLE),
        (b" " * (MAX_MANIFEST_BYTES + 1), ManifestReason.TOO_LARGE),
        (encode_manifest(small_manifest()) + b" ", ManifestReason.NOT_CANONICAL),
        (encode_manifest(draft()), ManifestReason.NOT_CANONICAL),
    ],
)
def test_bytes_that_are_no_manifest_are_refused_by_name(data: bytes, reason: ManifestReason) -> None:
    with pytest.raises(ManifestError) as caught:
        decode_manifest(data)
    assert caught.value.reason == reason


@given(st.binary(max_size=300), st.integers(0, 2000))
def test_damaged_bytes_never_decode_to_another_manifest(noise: bytes, place: int) -> None:
    original = encode_manifest(small_manifest(2))
    damaged = original[:place] + noise + original[place + len(noise) :]
    try:
        manifest = decode_manifest(damaged)
    except ManifestError:
        return
    assert encode_manifest(manifest) == damaged


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_cut_and_its_head_does_not_slow_the_last_stage(name: str) -> None:
    preset = preset_of(name)
    kind = {"images": ImageSettings(preset.image_size), "sequence": 1} if preset.image_size else {}
    for stages in (1, 2, 4):
        manifest = complete(TaskManifest(preset.family, preset.config, stages=stages, **kind))
        assert sum(manifest.cuts) == manifest.layers
        assert kind or manifest.cuts[-1] <= manifest.cuts[0]
        assert [manifest.stage(index).first for index in range(stages)] == [
            sum(manifest.cuts[:index]) for index in range(stages)
        ]


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        preset_of("llama-9000b")
    assert caught.value.reason == ManifestReason.UNKNOWN_PRESET


def test_cuts_minimise_the_slowest_stage() -> None:
    assert balanced_cuts(8, 2, Costs(layer=10, embedding=0, head=20)) == (5, 3)
    assert balanced_cuts(4, 4, Costs(layer=10, embedding=0, head=99)) == (1, 1, 1, 1)
    assert balanced_cuts(7, 2, Costs(layer=10, embedding=0, head=0)) in {(3, 4), (4, 3)}
    assert balanced_cuts(4, 2, Costs(layer=10, embedding=5, head=0, each=(5, 20, 5, 5))) == (1, 3)
    assert balanced_cuts(4, 2, Costs(layer=10, embedding=0, head=9, each=(5, 5, 5, 20))) == (3, 1)


def test_manifests_and_presets_import_neither_torch_nor_transformers() -> None:
    code = "import sys, trainer.manifest, trainer.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
