"""Images from every source, what is refused, and runs on scikit-learn's digits."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import pytest
import torch
from image_samples import CLASSES, classes_of, image_batches, image_set, resnet_manifest, uncut
from PIL import Image
from swarm_kit import manifest_of
from transformers import AutoImageProcessor, AutoModelForImageClassification

from trainer import LocalRun, RunSettings
from trainer.errors import DataError, DataReason, ManifestError, ManifestReason, TrainerError
from trainer.image_classes import ImageClasses, open_classes
from trainer.image_data import ImageBatches, ImageSet, divided, validation_on
from trainer.images import Form, read_images
from trainer.manifest import TaskManifest, complete
from trainer.pretrained import read_pretrained, starting_states
from trainer.run import joined
from trainer.state import initial_state

DIGITS = (Path("digits"),)
SHORT = RunSettings(steps=40, batch=8, microbatches=8, learning_rate=3e-3, validation=0.2, image_size=16)


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 9)) -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8), mode)


def save_folders(folder: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / name / "more").mkdir(parents=True)
        picture(number).save(folder / name / "b.png")
        picture(number + 5, "L").save(folder / name / "more" / "a.png")
        (folder / name / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()


def save_data_set(folder: Path, labels: list[int], names: tuple[str, ...] = ("cat", "dog")) -> None:
    folder.mkdir()
    rows = []
    for number, _ in enumerate(labels):
        data = io.BytesIO()
        picture(number).save(data, "PNG")
        rows.append({"bytes": data.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"picture": pyarrow.array(rows, kind), "kind": pyarrow.array(labels, pyarrow.int64())})
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    features = {"picture": {"_type": "Image"}, "kind": {"names": names, "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_the_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    found = read_images(DIGITS, Form(8, 1), tmp_path)
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert found.pixels.shape == (1797, 1, 8, 8)
    assert np.array_equal(found.labels, digits.target)
    assert np.array_equal(np.round(found.pixels[:, 0] * (16 / 255)), digits.images)
    assert found.names == tuple("0123456789")
    assert read_images(DIGITS, Form(8, 1), tmp_path).data == found.data
    assert read_images(DIGITS, Form(9, 1), tmp_path).data != found.data
    assert not list(tmp_path.iterdir())


def test_folders_of_classes_and_saved_data_sets_hold_the_same_images(tmp_path: Path) -> None:
    save_folders(tmp_path / "folders")
    save_data_set(tmp_path / "saved", [0, 1, 1])
    found = read_images((tmp_path / "folders",), Form(4, 3), tmp_path)
    assert found.names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(picture(0).resize((4, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(found.pixels[0], first)
    assert np.array_equal(found.pixels[1][0], found.pixels[1][2])  # grey, as red and blue alike
    both = read_images((tmp_path / "saved", tmp_path / "folders"), Form(4, 3), tmp_path)
    assert both.labels.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert np.array_equal(both.pixels[0], found.pixels[0])


def test_what_an_image_processor_of_transformers_makes_is_what_was_trained_on(tmp_path: Path) -> None:
    classes = ImageClasses(("a", "b"), 5, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    for name, data in classes.files(1).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", **classes.model_settings}))
    assert open_classes(tmp_path) == classes
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    picture(3).save(folder / "x.png")
    own = classes.normalised(read_images((folder.parent,), Form(5, 3), tmp_path).pixels)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(picture(3), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.from_numpy(own), theirs, rtol=0, atol=1e-6)


def test_batches_visit_each_image_once_an_epoch_and_the_same_everywhere() -> None:
    manifest = resnet_manifest(2, 20)
    data, again = image_batches(manifest, 32), image_batches(manifest, 32)
    epochs = []
    for epoch in range(2):
        seen = [data.batch(1 + 2 * epoch + cell // 4, cell % 4) for cell in range(8)]
        epochs.append(torch.cat([batch.tokens for batch in seen]))
        assert len({tuple(row.flatten().tolist()) for row in epochs[-1]}) == 32
    assert not torch.equal(*epochs)
    for step, cell in ((1, 0), (7, 3)):
        assert all(torch.equal(a, b) for a, b in zip(data.batch(step, cell), again.batch(step, cell), strict=True))
    later = data.continued(resnet_manifest(2, 10, start=4, initial=("0" * 64,) * 2))
    assert torch.equal(later.batch(1, 2).tokens, data.batch(5, 2).tokens)
    with pytest.raises(IndexError):
        data.batch(1, 4)


def test_a_share_is_kept_apart_and_holds_every_class() -> None:
    manifest = resnet_manifest()
    images = image_set(manifest, 100)
    rows, kept = divided(images, 0.2)
    assert sorted((*rows, *kept)) == list(range(100))
    assert len(kept) == 20
    assert set(images.labels[kept]) == set(range(CLASSES))
    held = validation_on(images, kept, classes_of(manifest), manifest)
    assert held.count == manifest.microbatches
    assert held.batch(0).labels.tolist() == images.labels[kept[:4]].tolist()


def damaged(folder: Path) -> None:
    save_folders(folder)
    (folder / "cat" / "c.png").write_bytes(b"no picture")


def bomb(folder: Path) -> None:
    save_folders(folder)
    Image.new("1", (20000, 20000)).save(folder / "cat" / "c.png")


SOURCES: dict[str, tuple[Callable[[Path], object], DataReason]] = {
    "nothing": (lambda path: None, DataReason.MISSING),
    "no classes": (Path.mkdir, DataReason.NOT_IMAGE),
    "no images": (lambda path: (path / "cat").mkdir(parents=True), DataReason.EMPTY),
    "damaged": (damaged, DataReason.NOT_IMAGE),
    "bomb": (bomb, DataReason.NOT_IMAGE),
    "no class": (lambda path: save_data_set(path, [0, -1]), DataReason.LABEL),
    "too high": (lambda path: save_data_set(path, [0, 2]), DataReason.LABEL),
}


@pytest.mark.parametrize("name", SOURCES)
def test_bad_images_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, reason = SOURCES[name]
    make(tmp_path / "data")
    with pytest.raises(DataError) as caught:
        read_images((tmp_path / "data",), Form(4, 3), tmp_path)
    assert caught.value.reason == reason
    assert caught.value.hint


@pytest.mark.parametrize("library", ["sklearn.datasets", "PIL"])
def test_a_library_that_is_not_there_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError) as caught:
        read_images(DIGITS, Form(8, 1), tmp_path)
    assert caught.value.reason == DataReason.LIBRARY
    assert "tdml[vision]" in caught.value.hint


def test_images_that_are_not_those_of_the_task_are_refused() -> None:
    manifest = resnet_manifest()
    images, rows, classes = image_set(manifest), np.arange(10), classes_of(manifest)
    wrong = {
        DataReason.IMAGE_SIZE: ImageSet(images.pixels[:, :, :8, :8], images.labels, images.names, ""),
        DataReason.UNKNOWN_CLASS: ImageSet(images.pixels, images.labels, (*"abcd", "zebra"), ""),
        DataReason.LABEL: ImageSet(images.pixels, images.labels + 1, images.names, ""),
    }
    for reason, each in wrong.items():
        with pytest.raises(DataError) as caught:
            ImageBatches(each, rows, classes, manifest)
        assert caught.value.reason == reason
    for share, reason in ((1.0, DataReason.BAD_SPLIT), (0.02, DataReason.TOO_SHORT)):
        with pytest.raises(DataError) as caught:
            validation_on(images, divided(images, share)[1], classes, manifest)
        assert caught.value.reason == reason


REFUSED: dict[str, tuple[dict[str, object], ManifestReason]] = {
    "stages": ({"stages": 5}, ManifestReason.TOO_MANY_STAGES),
    "cuts": ({"cuts": (3, 2)}, ManifestReason.BAD_CUTS),
    "text": ({"images": None}, ManifestReason.BAD_IMAGES),
    "sequence": ({"sequence": 8}, ManifestReason.BAD_IMAGES),
    "size": ({"images": {"size": 5000}}, ManifestReason.BAD_IMAGES),
    "no size": ({"images": {"size": 0}}, ManifestReason.BAD_IMAGES),
    "one value": ({"batch": 1, "images": {"size": 8}}, ManifestReason.BAD_IMAGES),
    "too large": ({"batch": 4096, "images": {"size": 4096}}, ManifestReason.CELL_TOO_LARGE),
    "compression": ({"compression": "bf16"}, ManifestReason.BAD_COMPRESSION),
    "depths": ({"config": {"depths": "2"}}, ManifestReason.BAD_CONFIG),
    "numbers": ({"config": {"hidden_sizes": "8,x"}}, ManifestReason.BAD_CONFIG),
    "blocks": ({"config": {"depths": "1024,1", "hidden_sizes": "8,8"}}, ManifestReason.BAD_CONFIG),
    "none": ({"config": {"depths": "0,1"}}, ManifestReason.BAD_CONFIG),
    "kind": ({"config": {"layer_type": "wide"}}, ManifestReason.BAD_CONFIG),
    "stranger": ({"config": {"hidden_size": 8}}, ManifestReason.UNKNOWN_SETTING),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_task_that_cannot_be_trained_exactly_is_refused(name: str) -> None:
    base = msgspec.to_builtins(resnet_manifest(2))
    change, reason = REFUSED[name]
    changed = {**base, "cuts": [], **change}
    changed["config"] = {**base["config"], **change.get("config", {})}  # type: ignore[dict-item]
    with pytest.raises(ManifestError) as caught:
        complete(msgspec.convert(changed, TaskManifest))
    assert caught.value.reason == reason


def test_text_models_take_no_images() -> None:
    text = manifest_of()
    with pytest.raises(ManifestError) as caught:
        complete(msgspec.structs.replace(text, images=resnet_manifest().images))
    assert caught.value.reason == ManifestReason.BAD_IMAGES


def held_out(run: LocalRun) -> tuple[torch.Tensor, torch.Tensor]:
    assert run.validation is not None
    batches = [run.validation.batch(index) for index in range(run.validation.count)]
    return torch.cat([batch.tokens for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_a_resnet_learns_the_digits_and_opens_in_transformers(tmp_path: Path) -> None:
    run = LocalRun.create("resnet-tiny", "digits", tmp_path / "out", SHORT)
    losses = [step.loss for step in run]
    assert losses[-1] < losses[0] / 3
    before = run.evaluate()
    run.save()
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    pixels, labels = held_out(run)
    stage = run._trainer._stage
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    assert torch.equal(logits, stage.logits(pixels))
    assert float((logits.argmax(1) == labels).float().mean()) > 0.9
    assert before == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels.long())), rel=1e-5)
    assert model.config.id2label[7] == "7"
    tracked = model.state_dict()["resnet.embedder.embedder.normalization.num_batches_tracked"]
    assert (tracked.dtype, int(tracked)) == (torch.int64, 40 * 8)
    assert "image-classification" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_run_goes_on_where_it_stopped_and_from_its_weights(tmp_path: Path) -> None:
    settings = replace(SHORT, steps=4, microbatches=2)
    whole = [step.loss for step in LocalRun.create("resnet-tiny", "digits", tmp_path / "a", settings)]
    run = LocalRun.create("resnet-tiny", "digits", tmp_path / "b", settings)
    losses = [run.advance().loss, run.advance().loss]
    run.save()
    again = LocalRun.resume(tmp_path / "b", "digits", settings)
    assert [*losses, *(step.loss for step in again)] == whole
    again.save()
    (tmp_path / "other").mkdir()
    save_folders(tmp_path / "other" / "x")
    for data, change in (("digits", {"validation": 0.1}), (tmp_path / "other" / "x", {})):
        with pytest.raises(TrainerError) as caught:
            LocalRun.resume(tmp_path / "b", data, replace(settings, **change))
        assert caught.value.reason in (DataReason.CHANGED, DataReason.UNKNOWN_CLASS)
    onward = LocalRun.create(tmp_path / "b", "digits", tmp_path / "c", replace(settings, image_size=0))
    assert onward._checkpoint.manifest.images == again._checkpoint.manifest.images
    assert torch.equal(onward._trainer.state.weights, again._trainer.state.weights)
    assert onward.advance().loss < whole[0]


def test_a_model_of_transformers_is_trained_on_from_its_weights(tmp_path: Path) -> None:
    manifest = resnet_manifest(1)
    model = uncut(manifest)
    for _ in range(3):
        model(pixel_values=image_batches(manifest).batch(1, 0).tokens)
    model.save_pretrained(tmp_path)
    for name, data in classes_of(manifest).files(1).items():
        (tmp_path / name).write_bytes(data)
    found = read_pretrained(tmp_path)
    read = complete(TaskManifest(found.family, found.config, batch=4, sequence=1, images=manifest.images))
    assert read.config == manifest.config
    cut = resnet_manifest(2, config=found.config)
    state = joined(cut, starting_states(found, cut))
    layout = manifest.whole_layout
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        expected = model.state_dict()[tensor.name].float().flatten()
        assert torch.equal(state.weights[start:stop], expected), tensor.name
    assert not torch.equal(state.weights, initial_state(manifest, 0).weights)


def test_what_a_new_run_on_images_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "resnet", "depths": [1, 1], "hidden_sizes": [8, 8]})
    )
    cases: dict[ManifestReason, tuple[str, RunSettings]] = {
        ManifestReason.BAD_IMAGES: (str(tmp_path / "config.json"), RunSettings()),
        ManifestReason.BAD_ADAPTERS: ("resnet-tiny", RunSettings(lora=4)),
    }
    for reason, (model, settings) in cases.items():
        with pytest.raises(ManifestError) as caught:
            LocalRun.create(model, "digits", tmp_path / "out", settings)
        assert caught.value.reason == reason
        assert caught.value.hint
