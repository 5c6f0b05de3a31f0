"""Prompt expansion: the model's own language model rewrites a prompt, told to by the model makers' system message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsDamagedError
from ..weights import FETCH_AGAIN, read_json
from .tokenizer import ChatTokenizer, Message

TEMPERATURE = 0.15
"""Sampling temperature. Source: ``caption_upsample_temperature`` recommended by diffusers' Flux2Pipeline."""

MAX_NEW_TOKENS = 512


class Expander:
    """The whole language model of a checkpoint, with the layers and the head that encoding leaves out.

    Args:
        folder: the checkpoint's folder.
        tokenizer: its tokenizer.
        parts: whether messages are lists of typed parts (Mistral) or strings (Qwen).
        dtype: of the weights.
        device: where it runs.

    Raises:
        WeightsDamagedError: the language model cannot be loaded.
    """

    def __init__(
        self, folder: Path, tokenizer: ChatTokenizer, parts: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        import transformers

        self.tokenizer, self.parts, self.device = tokenizer, parts, device
        names = read_json(folder / "text_encoder" / "config.json").get("architectures") or [""]
        cls: Any = getattr(transformers, names[0], None)
        if cls is None or not hasattr(cls, "from_pretrained"):
            raise WeightsDamagedError(f"text_encoder/config.json names {names[0]!r}, which transformers does not know.")
        try:
            model = cls.from_pretrained(
                folder / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsDamagedError(
                f"The language model in {folder} cannot be loaded: {error} {FETCH_AGAIN}"
            ) from error
        self.model = model.to(device).eval()

    def messages(self, prompt: str, system: str) -> list[Message]:
        if not self.parts:
            return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]},
        ]

    @torch.inference_mode()
    def __call__(self, prompt: str, system: str, seed: int) -> str:
        """The rewritten prompt; the prompt itself where the model answers with nothing.

        Args:
            prompt: the user's.
            system: the system message.
            seed: of the sampling, so that the same request is rewritten alike.
        """
        text = self.tokenizer.render(self.messages(prompt, system), prompt_next=True)
        tokens = self.tokenizer.encode([text], None, special=False)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=tokens.ids.to(self.device),
                attention_mask=tokens.mask.to(self.device),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                pad_token_id=self.tokenizer.pad_id,
            )
        answer = self.tokenizer.decode(out[0, tokens.ids.shape[1] :].tolist()).strip()
        return answer or prompt
