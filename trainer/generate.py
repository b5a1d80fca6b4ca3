"""Text from a trained model folder, by `transformers` alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trainer.errors import CheckpointError, CheckpointReason


def generate(folder: Path, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """Return `prompt` continued by at most `tokens` tokens; temperature 0 takes the likeliest each time.

    Raise `CheckpointError` if `folder` holds no model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            CheckpointReason.MISSING, f"There is no model in {folder}.", "Give the --out folder of a run."
        )
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
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
