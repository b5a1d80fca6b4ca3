"""What the workers beside a private run's client can read of its text: tokens from activations, labels from gradients.

A model is trained on Python's own library, its ends drawn from a seed of their own. Then four curious workers look at
what crosses the two cuts, for ends that keep 0, 1, … decoder layers:

`model known`  has the client's first stage, as of a published model, and tries every token at every position.
`frequencies`  groups equal activations and gives the most frequent group the most frequent token of other such text.
`text known`   knows a quarter of the text, and takes for every position the token of the nearest known activation.
`labels`       the same with the gradients at the other end.

Prints one JSON object: the share of the tokens that each gets right. `guess` is that of the most frequent token alone,
`in known text` what the last two can reach: the rest of the text has tokens that the known quarter lacks.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data import Batches, Corpus, load_batches, standard_library
from trainer.ends import drawn_ends, keeping
from trainer.local import LocalTrainer
from trainer.manifest import TaskManifest, complete
from trainer.run import joined
from trainer.stage import CellKey, Stage, build_stage, stage_layout
from trainer.state import StageState, initial_state
from trainer.tokens import train_tokenizer

_SECRET = 0x5EED5EED
_GUESSED = (2, 32)
"""Sequences that are guessed token by token, and tokens of each."""
Options = argparse.Namespace


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    options = _options()
    corpus = Corpus((standard_library(),), "text", 1 << 21)
    tokenizer = train_tokenizer(corpus.texts(), options.vocabulary)
    with tempfile.TemporaryDirectory() as cache:
        found = {
            str(kept): measured(manifest_of(options, kept), corpus_batches(corpus, tokenizer, options, Path(cache)))
            for kept in options.kept
        }
    print(json.dumps({"options": vars(options), "kept layers": found}, indent=2))


def manifest_of(options: Options, kept: int) -> TaskManifest:
    """Return a private run of one seated stage."""
    config: dict[str, int | float | bool | str] = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "intermediate_size": 3 * options.hidden,
        "num_attention_heads": 4,
    }
    sizes = {"batch": 8, "microbatches": 8, "sequence": 64, "steps": options.steps}
    return keeping(complete(TaskManifest("llama", config, stages=3, private=True, **sizes)), kept)


def corpus_batches(corpus: Corpus, tokenizer: Any, options: Options, cache: Path) -> Batches:
    """Return the batches of any of the runs."""
    return load_batches(corpus, tokenizer, manifest_of(options, 0), cache)


def measured(manifest: TaskManifest, batches: Batches) -> dict[str, float]:
    """Return what each attacker gets right after the run's steps."""
    states = trained(manifest, batches)
    tokens, activations, gradients = crossing(manifest, states, batches)
    known = len(activations) // 4
    shares = Counter(tokens[:, :-1].flatten().tolist())
    flat = tokens[:, :-1].flatten()
    front = loaded(manifest, states[0], 0)
    return {
        "guess": max(shares.values()) / len(flat),
        "model known": model_known(front, tokens[:, :-1], activations),
        "frequencies": frequencies(activations, flat, other_text(batches, manifest)),
        "in known text": float(torch.isin(flat[known:], flat[:known]).float().mean()),
        "text known": nearest(activations, flat, known),
        "labels": nearest(gradients, tokens[:, 1:].flatten(), known),
    }


def trained(manifest: TaskManifest, batches: Batches) -> tuple[StageState, ...]:
    """Return the stages' states after the run."""
    first, last = drawn_ends(manifest, _SECRET)
    whole = LocalTrainer(manifest, batches, joined(manifest, (first, initial_state(manifest, 1), last)))
    while whole.state.step < manifest.steps:
        whole.advance()
    uncut, places = whole.manifest, {}
    for tensor, place in zip(stage_layout(uncut, 0).tensors, stage_layout(uncut, 0).ranges, strict=True):
        places[tensor.name] = slice(*place)
    states = []
    for index in range(manifest.stages):
        names = [tensor.name for tensor in stage_layout(manifest, index).tensors]
        weights = torch.cat([whole.state.weights[places[name]] for name in names])
        states.append(StageState(manifest.steps, weights, weights, weights))
    return tuple(states)


def loaded(manifest: TaskManifest, state: StageState, index: int) -> Stage:
    """Return a stage with its weights."""
    stage = build_stage(manifest, index)
    stage.load(state.weights)
    return stage


def crossing(manifest: TaskManifest, states: tuple[StageState, ...], batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens with the last label (B,T+1), and by position what crosses the first cut and, back, the last."""
    stages = [loaded(manifest, state, index) for index, state in enumerate(states)]
    tokens, activations, gradients = [], [], []
    for cell in range(manifest.microbatches):
        batch, key = batches.batch(manifest.steps + 1, cell), CellKey(0, 1, cell)
        x = stages[0].evaluate(batch.tokens, None)
        y = stages[1].evaluate(x, None)
        stages[2].forward(key, y, batch.labels)
        tokens.append(torch.cat((batch.tokens, batch.labels[:, -1:]), 1))
        activations.append(x.flatten(0, 1))
        gradients.append(stages[2].backward(key, None).gx.flatten(0, 1))
    return torch.cat(tokens), torch.cat(activations), torch.cat(gradients)


def other_text(batches: Batches, manifest: TaskManifest) -> Counter[int]:
    """Return how often each token comes in text of the same kind that is not looked at."""
    later = [batches.batch(manifest.steps + 2 + step, cell) for step in range(8) for cell in range(8)]
    return Counter(token for batch in later for token in batch.tokens.flatten().tolist())


def model_known(front: Stage, tokens: Tensor, activations: Tensor) -> float:
    """Return the share found by trying every token after what was found before, nearest output first."""
    vocabulary, length = front.module.embed_tokens.weight.shape[0], tokens.shape[1]  # type: ignore[attr-defined]
    every, right = torch.arange(vocabulary, dtype=torch.int32).unsqueeze(1), 0
    rows, places = _GUESSED
    for row, truth in enumerate(tokens[:rows, :places].tolist()):
        seen = activations[row * length : (row + 1) * length]
        prefix: list[int] = []
        for place in range(places):
            tried = torch.tensor(prefix, dtype=torch.int32).expand(vocabulary, -1)
            outputs = torch.cat([front.evaluate(torch.cat(parts, 1), None)[:, -1] for parts in _chunks(tried, every)])
            prefix.append(int((outputs - seen[place]).norm(dim=1).argmin()))
        right += sum(a == b for a, b in zip(prefix, truth, strict=True))
    return right / (rows * places)


def _chunks(tried: Tensor, every: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tried.split(512), every.split(512), strict=True))


def frequencies(activations: Tensor, tokens: Tensor, elsewhere: Counter[int]) -> float:
    """Return the share found by ranks: the n-th most frequent activation is the n-th most frequent token."""
    _, groups = torch.unique((activations * 1e4).round(), dim=0, return_inverse=True)
    ranks = [group for group, _ in Counter(groups.tolist()).most_common()]
    said = dict(zip(ranks, [token for token, _ in elsewhere.most_common()], strict=False))
    return sum(said.get(group) == token for group, token in zip(groups.tolist(), tokens.tolist(), strict=True)) / len(
        tokens
    )


def nearest(seen: Tensor, truth: Tensor, known: int) -> float:
    """Return the share of the positions after `known` ones whose nearest known one, by angle, has their token."""
    unit = seen / seen.norm(dim=1, keepdim=True).clamp_min(1e-12)
    best = torch.cat([(part @ unit[:known].T).argmax(1) for part in unit[known:].split(512)])
    return float((truth[:known][best] == truth[known:]).float().mean())


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
