"""A byte-level BPE tokenizer over captions. Text in double quotes and runs of capitals are split into single
letters, so that the model can spell what it has to write on a sign."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .captions import caption, rich, short
from .scenes import random_scene
from .trainer import Run

VOCABULARY = 1024
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[DESCRIBE]", "[REWRITE]", "[EDIT]")

# The system messages of the FLUX.2 pipelines only choose what the language model does next; here one token does.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(mode='[DESCRIBE]') -%}
{%- for message in messages if message.role == 'system' -%}
{%- set system = message.content if message.content is string else message.content[0].text -%}
{%- if 'prompt engineer' in system -%}{%- set ns.mode = '[REWRITE]' -%}
{%- elif 'image-editing' in system -%}{%- set ns.mode = '[EDIT]' -%}{%- endif -%}
{%- endfor -%}
{{- ns.mode -}}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'user' -%}[INST]{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
{%- if message.role == 'user' -%}[/INST]{%- else -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""

IN_QUOTES = r'[A-Za-z0-9](?=[^"]*"(?:[^"]*"[^"]*")*[^"]*$)'
CAPITALS = r"[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"


def texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        scene = random_scene(rng)
        yield caption(scene, rng)
        yield short(scene, rng)
        yield rich(scene, rng)


def build(count: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``count`` scenes' captions; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(IN_QUOTES), "isolated"),
            pre_tokenizers.Split(Regex(CAPITALS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(count), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[4:]),
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train(run: Run) -> None:
    build().save_pretrained(run.path("tokenizer"))


def load(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
