"""Prompt expansion: the model's own language model rewrites a prompt, told to by the model makers' system message.

It works on the text encoder's weights, wherever the plan has them, and on the layers and the head that encoding leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..costs import ANSWER_AT_MOST
from ..model.language import LanguageModel, Past, Remainder
from ..weights import read_json
from .tokenizer import ChatTokenizer, Message, Tokens

TEMPERATURE = 0.15
"""Sampling temperature. Source: ``caption_upsample_temperature`` recommended by diffusers' Flux2Pipeline."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        stops: tokens that end the answer.
        top_k: tokens that are drawn from at most, 0 for all; transformers' default where a checkpoint names none.
        top_p: they end where their probabilities reach this sum.
    """

    stops: tuple[int, ...]
    top_k: int = 50
    top_p: float = 1.0

    @classmethod
    def of(cls, folder: Path) -> Sampling:
        """What a checkpoint's ``text_encoder`` says.

        Raises:
            WeightsDamagedError: its files cannot be read.
        """
        path, config = (
            folder / "text_encoder" / "generation_config.json",
            read_json(folder / "text_encoder/config.json"),
        )
        own = read_json(path) if path.exists() else {}
        stops = own.get("eos_token_id", config.get("text_config", config).get("eos_token_id"))
        known = {name: own[name] for name in ("top_k", "top_p") if own.get(name) is not None}
        return cls(tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,), **known)

    def draw(self, scores: Tensor, generator: torch.Generator) -> int:
        """The next token; ``scores`` float32 [V] on the host."""
        scores = scores / TEMPERATURE
        if 0 < self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        if self.top_p < 1:
            values, order = scores.sort()
            unlikely = values.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[-1] = False
            scores[order[unlikely]] = -torch.inf
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class Expander:
    """The whole language model of a checkpoint, for as long as both its parts are held on the device.

    Args:
        encoder: the layers that encoding has.
        remainder: what follows them.
        tokenizer: the checkpoint's.
        parts: whether messages are lists of typed parts (Mistral) or strings (Qwen).
        sampling: how tokens are drawn.
        between: called before every token; may raise to stop.
    """

    def __init__(
        self,
        encoder: LanguageModel,
        remainder: Remainder,
        tokenizer: ChatTokenizer,
        parts: bool,
        sampling: Sampling,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        self.encoder, self.remainder, self.tokenizer, self.parts = encoder, remainder, tokenizer, parts
        self.sampling, self.between = sampling, between

    @torch.inference_mode()
    def __call__(self, prompt: str, system: str, seed: int) -> str:
        """The rewritten prompt; the prompt itself where the model answers with nothing.

        Args:
            prompt: the user's.
            system: the system message.
            seed: of the sampling, so that the same request is rewritten alike.
        """
        ids = chat(self.tokenizer, self.parts, prompt, system).ids
        answer = self.tokenizer.decode(self.answer(ids, torch.Generator().manual_seed(seed))).strip()
        return answer or prompt

    def answer(self, ids: Tensor, generator: torch.Generator) -> list[int]:
        """The tokens that follow ``ids``, int64 [1, T], up to the one that ends the answer; it is left out."""
        length, device = ids.shape[1] + ANSWER_AT_MOST, self.remainder.norm.weight.device
        layers = [*self.encoder.layers, *self.remainder.layers]
        pasts = [Past(self.encoder.config, length, self.encoder.dtype, device) for _ in layers]
        rotary = self.encoder.rotary(length, device)
        told: list[int] = []
        while len(told) < ANSWER_AT_MOST:
            self.between()
            begin = pasts[0].length
            x = self.encoder.embed_tokens(ids.to(device))
            rows = rotary[0][begin : begin + ids.shape[1]], rotary[1][begin : begin + ids.shape[1]]
            for layer, past in zip(layers, pasts, strict=True):
                x = layer(x, rows, None, past)
            token = self.sampling.draw(self.scores(x), generator)
            if token in self.sampling.stops:
                break
            told.append(token)
            ids = torch.tensor([[token]])
        return told

    def scores(self, x: Tensor) -> Tensor:
        """Of every token that may come next, float32 [V] on the host; ``x`` [1, T, C] is what the last layer gave."""
        head = self.encoder.embed_tokens if self.remainder.head is None else self.remainder.head
        state = self.remainder.norm(x[0, -1])
        return F.linear(state.to(head.weight.device), head.weight).float().cpu()


def chat(tokenizer: ChatTokenizer, parts: bool, prompt: str, system: str) -> Tokens:
    """The chat that asks for ``prompt`` to be rewritten, as tokens."""
    messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    if parts:
        texts = (system, prompt.replace("[IMG]", ""))
        messages = [
            {**message, "content": [{"type": "text", "text": text}]}
            for message, text in zip(messages, texts, strict=True)
        ]
    return tokenizer.encode([tokenizer.render(messages, prompt_next=True)], None, special=False)
