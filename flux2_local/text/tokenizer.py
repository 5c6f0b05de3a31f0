"""A checkpoint's tokenizer and chat template, read without importing transformers where ``tokenizer.json`` is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsDamagedError

Message = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """A padded batch: ids and attention mask, int64 [B, T]; ``cut`` says whether a prompt was longer than T."""

    ids: Tensor
    mask: Tensor
    cut: bool


class ChatTokenizer:
    """Chat messages -> token ids, as ``apply_chat_template`` of the checkpoint's own tokenizer gives them.

    Args:
        folder: the checkpoint's ``tokenizer`` folder.

    Raises:
        WeightsDamagedError: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            template_file = folder / "chat_template.jinja"
            template = template_file.read_text("utf-8") if template_file.exists() else config["chat_template"]
        except (OSError, ValueError, KeyError, Exception) as error:
            raise WeightsDamagedError(
                f"The tokenizer in {folder} cannot be read ({error}). It needs tokenizer.json, tokenizer_config.json and "
                f"a chat template; fetch the model again with `flux2-local download`."
            ) from error
        self._special = {k: _content(config.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._left = config.get("padding_side", "right") == "left"
        self._template = compile_template(template)
        pad = self._special["pad_token"]
        self.pad_id = self._tokenizer.token_to_id(pad) if pad else 0

    def render(self, messages: list[Message], *, prompt_next: bool) -> str:
        """The chat as text. ``prompt_next`` opens the assistant's turn."""
        text: str = self._template.render(
            messages=messages, add_generation_prompt=prompt_next, enable_thinking=False, **self._special
        )
        return text

    def encode(self, texts: list[str], length: int | None, *, special: bool) -> Tokens:
        """Token ids padded or cut to ``length`` (None: padded to the longest).

        ``special`` adds what the tokenizer's post-processor adds.
        """
        rows = [self._tokenizer.encode(text, add_special_tokens=special).ids for text in texts]
        length = length or max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id or 0)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            kept = torch.tensor(row[:length])
            where = slice(length - len(kept), length) if self._left else slice(0, len(kept))
            ids[i, where], mask[i, where] = kept, 1
        return Tokens(ids, mask, any(len(row) > length for row in rows))

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _content(token: Any) -> str | None:
    """Special tokens are strings or dicts with a ``content``."""
    return token["content"] if isinstance(token, dict) else token


def compile_template(source: str) -> Any:
    """A chat template in the sandbox and with the helpers that transformers gives it.

    Source: the environment of ``transformers.utils.chat_template_utils``.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
