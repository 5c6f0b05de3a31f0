"""Prompt -> what the transformer reads: hidden states of three layers of the language model, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.language import LanguageModel
from .tokenizer import ChatTokenizer, Message, Tokens


@dataclass(frozen=True)
class PromptStyle:
    """How a family phrases the prompt for its language model.

    Attributes:
        system: text of a system message before the prompt, or None.
        parts: whether a message's content is a list of typed parts (Mistral) or a string (Qwen).
        prompt_next: whether the assistant's turn is opened after the prompt.
        special: whether the tokenizer's own special tokens are added around the rendered chat.
        length: tokens that every prompt is padded or cut to.
    """

    system: str | None
    parts: bool
    prompt_next: bool
    special: bool
    length: int


def messages(prompt: str, style: PromptStyle) -> list[Message]:
    """The chat that carries ``prompt``."""
    if not style.parts:
        return [{"role": "user", "content": prompt}]
    system = [] if style.system is None else [{"role": "system", "content": [{"type": "text", "text": style.system}]}]
    # The image placeholder would be counted as a picture.
    return [*system, {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]}]


def tokenize(tokenizer: ChatTokenizer, prompts: list[str], style: PromptStyle) -> Tokens:
    texts = [tokenizer.render(messages(p, style), prompt_next=style.prompt_next) for p in prompts]
    return tokenizer.encode(texts, style.length, special=style.special)


@torch.inference_mode()
def embed(model: LanguageModel, tokens: Tokens, device: torch.device) -> Tensor:
    """[B, length, joint width], the model's dtype. Padding is encoded too and the transformer attends to it."""
    return model(tokens.ids.to(device), tokens.mask.to(device))
