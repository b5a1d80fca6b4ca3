"""The model card: what was trained, on what, and how to prove it by the chain."""

from typing import TYPE_CHECKING

from trainer.image_classes import ImageClasses

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint

_CARD = """---
library_name: {library}
pipeline_tag: {pipeline}
---
# {family}, {parameters:,} parameters{adapters}

Trained by a TDML swarm of {stages} stages × {replicas} replicas{ends}.

| | |
|---|---|
| Steps | {steps} of {planned}, {tokens:,} {units} each |
| Last loss | {loss} |
| Validation loss | {validation} |
| {reader} |
| Data | BLAKE3 `{data}`, {data_tokens:,} {units} |
| Task | `{task}` |
| Task manifest | `{address}` |
| Chain | {sealed_by} |

![loss](loss.svg)

```python
{usage}
```

{proof}`state/` resumes the run (`tdml-peer train --resume`).
"""
_WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
_ADAPTED = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
_IMAGES = """from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(".")
processor = AutoImageProcessor.from_pretrained(".")"""
_PROOF = """## Lineage

`chain.db` beside this file, copied with every checkpoint, holds the chain; block {height} is the newest one when the
weights were saved. Every claim, audit, vote and eviction of the task until then is in it. With any
recent block of the same network that you trust:

```sh
tdml-chain db check --db chain.db                 # execute the whole chain again from its genesis
tdml-chain task {task} --db chain.db --height {height}
tdml-chain evidence --db chain.db                 # who was evicted from what, and why
tdml-chain block {height} --db chain.db           # must be {block}
```

"""


def model_card(checkpoint: "Checkpoint") -> str:
    """Return the README.md of a model folder, in the format of Hugging Face's model cards."""
    manifest, tokenizer = checkpoint.manifest, checkpoint.tokenizer
    height, _, block = checkpoint.sealed_by.partition(":")
    kind = "raw bytes" if tokenizer.is_bytes else f"BLAKE3 `{tokenizer.name}`"
    reader = f"Tokenizer | {kind}, {tokenizer.vocabulary:,} ids"
    if isinstance(tokenizer, ImageClasses):
        reader = f"Classes | {tokenizer.vocabulary:,}, of images of {tokenizer.size} × {tokenizer.size} pixels"
    return _CARD.format(
        family=manifest.family,
        library="transformers" if manifest.lora is None else "peft",
        adapters="" if manifest.lora is None else f", adapters of rank {manifest.lora.rank}",
        pipeline="text-generation" if manifest.images is None else "image-classification",
        units="tokens" if manifest.images is None else "images",
        usage=_IMAGES if manifest.images is not None else _WHOLE if manifest.lora is None else _ADAPTED,
        parameters=manifest.parameters,
        stages=len(manifest.seated),
        ends=", embedding and head at its client" if manifest.private else "",
        replicas=manifest.replicas,
        steps=checkpoint.step,
        planned=manifest.total_steps,
        tokens=manifest.tokens_per_step,
        loss=_last(checkpoint.losses),
        validation=_last(checkpoint.validation),
        reader=reader,
        data=checkpoint.data or "unknown",
        data_tokens=checkpoint.tokens,
        task=checkpoint.task or "none: trained on one machine",
        address=manifest.address.hex(),
        sealed_by=f"height {height}, block `{block}`" if height else "none",
        proof=_PROOF.format(height=height, block=block, task=checkpoint.task) if height and checkpoint.task else "",
    )


def _last(points: tuple[tuple[int, float], ...]) -> str:
    return f"{points[-1][1]:.4f} after step {points[-1][0]}" if points else "none"
