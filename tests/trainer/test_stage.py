import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from training_samples import KEY, loaded_stages, run_cell, small_batches, small_manifest
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.checkpoint import whole_tensors
from trainer.errors import StageError, StageReason
from trainer.families import family_of
from trainer.kernel import kernel_class
from trainer.stage import CellKey, build_stage, execute
from trainer.state import initial_state


def whole_model(manifest):
    model = LlamaForCausalLM(LlamaConfig(**family_of("llama").whole_config(manifest.config))).train()
    states = [initial_state(manifest, index) for index in range(manifest.stages)]
    model.load_state_dict(whole_tensors(manifest, states))
    return model


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_cut_model_has_the_whole_models_loss_and_gradients(count: int) -> None:
    manifest = small_manifest(count)
    tokens, labels = small_batches(manifest).batch(1, 0)
    results = run_cell(loaded_stages(manifest), tokens, labels)
    model = whole_model(manifest)
    logits = model(input_ids=tokens.long()).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long())
    loss.backward()
    torch.testing.assert_close(results[-1].y.mean(), loss.detach(), rtol=1e-6, atol=0)
    gradients = dict(model.named_parameters())
    for stage, result in zip(loaded_stages(manifest), results, strict=True):
        for tensor, (start, stop) in zip(stage.layout.tensors, stage.layout.ranges, strict=True):
            expected = gradients[tensor.name].grad
            gap = torch.linalg.vector_norm(result.gw[start:stop].view(tensor.shape) - expected)
            assert float(gap / torch.linalg.vector_norm(expected)) < 1e-6, tensor.name


def test_initial_weights_do_not_depend_on_the_number_of_stages() -> None:
    tables = []
    for count in (1, 2, 4):
        manifest = small_manifest(count)
        states = [initial_state(manifest, index) for index in range(count)]
        tables.append(whole_tensors(manifest, states))
    for table in tables[1:]:
        assert table.keys() == tables[0].keys()
        assert all(torch.equal(table[name], tables[0][name]) for name in table)
    other = initial_state(small_manifest(seed=8), 0)
    assert not torch.equal(other.weights, initial_state(small_manifest(), 0).weights)


def test_cells_in_flight_do_not_disturb_each_other() -> None:
    manifest = small_manifest(2)
    stages, data = loaded_stages(manifest), small_batches(manifest)
    alone = [run_cell(stages, *data.batch(1, cell)) for cell in range(2)]
    keys = [CellKey(0, 1, cell) for cell in range(2)]
    hidden = [stages[0].forward(key, data.batch(1, key.cell).tokens, None).y for key in keys]
    for key in keys:
        stages[1].forward(key, hidden[key.cell], data.batch(1, key.cell).labels)
    for key in reversed(keys):
        gx, gw = stages[1].backward(key, None)
        assert torch.equal(gw, alone[key.cell][1].gw)
        assert torch.equal(stages[0].backward(key, gx).gw, alone[key.cell][0].gw)


def test_reexecution_is_bit_equal_whatever_the_buffers_are_aligned_to() -> None:
    manifest = small_manifest(2)
    tokens, labels = small_batches(manifest).batch(1, 0)
    first, last = run_cell(loaded_stages(manifest), tokens, labels)
    auditor = loaded_stages(manifest)[1]
    raw = torch.empty(first.y.numel() + 1)
    unaligned = raw[1:].view_as(first.y).copy_(first.y)
    again = execute(auditor, unaligned, labels, None)
    assert all(torch.equal(a, b) for a, b in zip(again[:3], last[:3], strict=True))
    assert again.boundaries == last.boundaries


@pytest.mark.slow
def test_another_process_gets_the_same_bits() -> None:
    code = (
        "import torch; torch.set_num_threads(1); from trainer.kernel import kernel_class; print(kernel_class().hex())"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == kernel_class().hex()


def test_loading_copies_and_drops_cells_in_flight() -> None:
    manifest = small_manifest()
    (stage,), state = loaded_stages(manifest), initial_state(manifest, 0)
    before = state.weights.clone()
    stage.forward(KEY, *small_batches(manifest).batch(1, 0))
    stage.load(torch.zeros_like(state.weights))
    assert torch.equal(state.weights, before)
    with pytest.raises(StageError) as caught:
        stage.backward(KEY, None)
    assert caught.value.reason == StageReason.UNKNOWN_CELL


def test_a_stage_refuses_wrong_calls_by_name() -> None:
    manifest = small_manifest(2)
    first, last = loaded_stages(manifest)
    tokens, labels = small_batches(manifest).batch(1, 0)
    hidden = first.forward(KEY, tokens, None).y
    calls = {
        StageReason.REPEATED_CELL: lambda: first.forward(KEY, tokens, None),
        StageReason.BAD_TOKEN: lambda: first.forward(KEY._replace(cell=1), tokens + 10_000, None),
        StageReason.BAD_TYPE: lambda: first.forward(KEY._replace(cell=1), tokens.float(), None),
        StageReason.BAD_SHAPE: lambda: last.forward(KEY, hidden[:, :, :3], labels),
        StageReason.UNKNOWN_CELL: lambda: last.backward(KEY, None),
        StageReason.WRONG_STATE: lambda: build_stage(manifest, 0).forward(KEY, tokens, None),
    }
    for reason, call in calls.items():
        with pytest.raises(StageError) as caught:
            call()
        assert caught.value.reason == reason
    for bad in (lambda: last.forward(KEY, hidden, None), lambda: last.forward(KEY, hidden, labels[:, :3])):
        with pytest.raises(StageError):
            bad()
    with pytest.raises(StageError):
        first.backward(KEY, hidden[:1])
    assert first.backward(KEY, torch.ones_like(hidden)).gx.numel() == 0


def test_an_audit_that_fails_leaves_no_cell_behind() -> None:
    manifest = small_manifest(2)
    first, _ = loaded_stages(manifest)
    tokens, _ = small_batches(manifest).batch(1, 0)
    for _ in range(2):
        with pytest.raises(StageError) as caught:
            execute(first, tokens, None, None)
        assert caught.value.reason == StageReason.BAD_SHAPE


@pytest.mark.parametrize("index", [0, 1, 2])
def test_computing_forward_twice_changes_no_bit_and_keeps_no_graph(index: int) -> None:
    manifest = small_manifest(3)
    tokens, labels = small_batches(manifest).batch(1, 0)
    shape = (manifest.batch, manifest.sequence, manifest.hidden)
    generator = torch.Generator().manual_seed(3)
    x = tokens if index == 0 else torch.randn(shape, generator=generator)
    gy = None if index == 2 else torch.randn(shape, generator=generator)
    given = labels if index == 2 else None
    results, kept = [], []
    for recompute in (False, True):
        stage = build_stage(manifest, index, recompute)
        stage.load(initial_state(manifest, index).weights)
        keys = [CellKey(0, 1, cell) for cell in range(2)]
        outputs = [stage.forward(key, x, given) for key in keys]
        kept.append([graph.y.grad_fn is not None for graph in stage._graphs.values()])
        results.append((*outputs[0], *stage.backward(keys[0], gy), *stage.backward(keys[1], gy)))
    for usual, again in zip(*results, strict=True):
        assert usual == again if isinstance(usual, tuple) else torch.equal(usual, again)
    assert kept == [[True] * 2, [index == 2] * 2]
