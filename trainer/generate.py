"""Text from a trained model folder, by `transformers` alone."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trainer.adapter_files import base_of, merge
from trainer.errors import CheckpointError, CheckpointReason


def generate(folder: Path, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """Return `prompt` continued by at most `tokens` tokens; temperature 0 takes the likeliest each time.

    Adapters are added to the weights of the model that they were trained on. Raise `CheckpointError` if `folder`
    holds no model.
    """
    base = base_of(folder)
    if not (base / "config.json").is_file():
        raise CheckpointError(
            CheckpointReason.MISSING,
            f"There is no model in {base}.",
            "Give the --out folder of a run; adapters need the model that they were trained on, too.",
        )
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32)
        if base != folder:
            merge(model, folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            CheckpointReason.DAMAGED, f"The model in {folder} cannot be opened: {str(error)[:200]}."
        ) from None
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    room = max(model.config.max_position_embeddings - tokens, 1)
    inputs = torch.tensor([ids[-room:]])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, **sampling)
    return prompt + str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
