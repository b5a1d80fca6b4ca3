"""A swarm of any shape against one plain process: the same model, parameter by parameter.

The reference is the uncut model of `transformers` with `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW` in
a plain loop; with dropout it draws the same masks. With --faults the shape is 2×2 and in each run something happens:
a worker dies in one phase of a step, pauses for 10 s, or comes in the middle. Prints a table, or one JSON line with
--json; exits with 1 if a run deviates.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bench.support.in_memory import QUIET, Trouble, train
from trainer.checkpoint import whole_tensors
from trainer.data import Batches
from trainer.families import family_of
from trainer.families.base import Config
from trainer.families.dropout import ATTENTION, EMBEDDING_LAYER, Masks, SeededDropout, seed_dropout
from trainer.local import whole
from trainer.manifest import OptimizerSettings, TaskManifest, complete
from trainer.messages import Activation, Gradient, Partial, Reduced, Summed
from trainer.optimizer import learning_rate
from trainer.state import initial_state
from trainer.transport import Faults

BOUND = 1e-5
SHAPES = ((1, 1), (2, 1), (2, 2), (4, 2))
_ROTARY: Config = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_LEARNED: Config = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 32,
}
_RATE = 0.1
_CLIP = 0.5
"""Gradients of these models are longer at first."""


@dataclass(frozen=True)
class Result:
    """One run: relative distance of all parameters, the tensor that is farthest, and whether it repeats."""

    family: str
    tied: bool
    dropout: bool
    stages: int
    replicas: int
    distance: float
    worst: str
    worst_distance: float
    repeats: bool
    trouble: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether the model is the reference's and, where routes are, the same each time."""
        return self.distance <= BOUND and (self.repeats or bool(self.trouble))


@dataclass(frozen=True)
class Case:
    """A model to train: its family, whether embedding and head are one tensor, and whether it has dropout."""

    family: str
    tied: bool = False
    dropout: bool = False


CASES = tuple(
    Case(family, tied, dropout)
    for family, tied in (("llama", False), ("gpt2", False), ("qwen2", False), ("gpt2", True), ("qwen2", True))
    for dropout in (False, True)
)


def manifest_of(case: Case, steps: int) -> TaskManifest:
    """Return a small run with warm-up, cosine schedule, weight decay and clipping."""
    family = case.family
    config = dict(_LEARNED if family == "gpt2" else _ROTARY) | {"tie_word_embeddings": case.tied}
    chances = ("resid_pdrop", "embd_pdrop", "attn_pdrop") if family == "gpt2" else ("attention_dropout",)
    config |= dict.fromkeys(chances, _RATE if case.dropout else 0.0)
    optimizer = OptimizerSettings(warmup_steps=max(steps // 5, 1), schedule="cosine", clip=_CLIP)
    draft = TaskManifest(
        family, config, seed=11, batch=2, microbatches=4, sequence=16, steps=steps, optimizer=optimizer
    )
    return complete(draft)


def troubles(steps: int) -> dict[str, Trouble]:
    """Return what may happen to a swarm of 2×2 in the middle of so many steps."""
    middle = max(steps // 2, 1)
    return {
        "forward": Trouble(lambda: Faults().crash("s0r1", after=2 * middle, of=Activation)),
        "backward": Trouble(lambda: Faults().crash("s1r1", after=2 * middle, of=Gradient)),
        "reduction": Trouble(lambda: Faults().crash("s0r1", after=middle, of=Partial)),
        "optimiser": Trouble(lambda: Faults().crash("s1r0", after=middle, of=Summed)),
        "commit": Trouble(lambda: Faults().crash("s0r0", after=middle, of=Reduced)),
        "pause": Trouble(pause=("s1r0", 8 * middle, 10.0)),
        "joiner": Trouble(joiner=("s1r2", 1, middle)),
    }


def measure(
    case: Case, steps: int, shapes: Iterable[tuple[int, int]] = SHAPES, name: str = "", trouble: Trouble = QUIET
) -> list[Result]:
    """Return how far each shape's parameters are from one plain process's, whatever happens on the way."""
    torch.set_num_threads(1)
    base = manifest_of(case, steps)
    expected = plain_training(base, _batches(base))
    results = []
    for stages, replicas in shapes:
        manifest = complete(msgspec.structs.replace(base, stages=stages, cuts=(), replicas=replicas))
        runs = [whole_tensors(manifest, train(manifest, _batches(manifest), trouble)) for _ in range(2)]
        found = runs[0]
        farthest = max(expected, key=lambda tensor: _distance(found, expected, [tensor]))
        results.append(
            Result(
                family=case.family,
                tied=case.tied,
                dropout=case.dropout,
                stages=stages,
                replicas=replicas,
                distance=_distance(found, expected, list(expected)),
                worst=farthest,
                worst_distance=_distance(found, expected, [farthest]),
                repeats=all(torch.equal(runs[0][tensor], runs[1][tensor]) for tensor in expected),
                trouble=name,
            )
        )
    return results


def plain_training(manifest: TaskManifest, batches: Batches) -> dict[str, Tensor]:
    """Return the parameters after training the uncut model of `transformers` in a plain loop."""
    masks = Masks(manifest.seed)
    model = _uncut(manifest, masks)
    settings, named = manifest.optimizer, dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in named.values() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for step in range(1, manifest.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, manifest.steps)
        optimizer.zero_grad()
        for cell in range(manifest.microbatches):
            masks.cell = (step, cell)
            tokens, labels = batches.batch(step, cell)
            logits = model(input_ids=tokens.long()).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long())
            (loss / manifest.microbatches).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), settings.clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def _uncut(manifest: TaskManifest, masks: Masks) -> Any:
    """Return the initial model in training mode, its dropout drawing from `masks`."""
    config = AutoConfig.for_model(**family_of(manifest.family).whole_config(manifest.config))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    body = model.get_decoder()
    for index, layer in enumerate(body.h if manifest.family == "gpt2" else body.layers):
        seed_dropout(layer, masks, index)
    if manifest.family == "gpt2":
        body.drop = SeededDropout(body.drop.p, masks, EMBEDDING_LAYER, "drop")
    tensors = whole_tensors(manifest, [initial_state(whole(manifest), 0)])
    if tied := family_of(manifest.family).tied(manifest.config):
        tensors["lm_head.weight"] = tensors[tied]
    model.load_state_dict(tensors)
    return model.train()


def _batches(manifest: TaskManifest) -> Batches:
    return Batches(np.random.default_rng(5).integers(0, 128, 4000).astype(np.int32), manifest)


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    a, b = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


def main() -> None:
    """Measure every family and shape, with and without dropout, tied or not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON line only")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--faults", action="store_true", help="let workers die, pause and come on the way")
    arguments = parser.parse_args()
    results: list[Result] = []
    if not arguments.json:
        print(f"{'family':7} {'tied':5} {'dropout':8} {'shape':6} {'distance':>9}  {'repeats':8} farthest tensor")
    for found in _faulty(arguments.steps) if arguments.faults else (measure(case, arguments.steps) for case in CASES):
        results.extend(found)
        if not arguments.json:
            _show(found)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
    sys.exit(not all(result.is_equal for result in results))


def _faulty(steps: int) -> Iterable[list[Result]]:
    """Return what comes of every trouble in turn, with dropout and without."""
    for case in CASES[:2]:
        for name, trouble in troubles(steps).items():
            yield measure(case, steps, ((2, 2),), name, trouble)


def _show(results: list[Result]) -> None:
    for each in results:
        shape, dropout = f"{each.stages}x{each.replicas}", "on" if each.dropout else "off"
        tied = "yes" if each.tied else "no"
        line = (
            f"{each.family:7} {tied:5} {dropout:8} {shape:6} {each.distance:9.1e}  {'yes' if each.repeats else 'NO':8}"
        )
        print(f"{line} {each.worst} {each.worst_distance:.1e} {each.trouble}", flush=True)


if __name__ == "__main__":
    main()
