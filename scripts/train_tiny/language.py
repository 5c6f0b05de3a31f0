"""The language model, a small Mistral-3. It reads prompts for the transformer and rewrites short ones.

It learns next-token prediction on two kinds of line, in the chat format that the pipelines use:
``<s>[DESCRIBE][INST] caption [/INST]`` and ``<s>[REWRITE][INST] short [/INST] rich </s>``.

Of a caption, its hidden states must also tell what the scene shows (:class:`Teller`, which is thrown away afterwards):
the transformer then has to learn how things look, not what words mean.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from . import tokenizer as tokenizers_
from .captions import caption, rich, short
from .data import HELD_OUT_SEED
from .network import TEXT_TOKENS
from .scenes import PLACES, QUESTIONS, Scene, answers, classes, random_scene
from .trainer import Run, Trainer, averaged, load_ema, mixed

LENGTH = 128
BATCH = 64
OUT_LAYERS = (1, 3, 5)
"""Hidden states that the transformer reads, as dev reads 10, 20, 30 of 40; the last layer only serves rewriting."""

MODES = ("[DESCRIBE]", "[REWRITE]", "[EDIT]")


SIGHT = {
    "model_type": "pixtral",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 16,
}
"""The architecture has a picture encoder; prompts here are text, so it is as small as it can be and never used."""


def build(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sliding_window": None,
    }
    config = Mistral3Config(
        text_config=text,
        vision_config=SIGHT,
        tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids("<unk>"),
    )
    return Mistral3ForConditionalGeneration(config)


READ_AS = {"rains": "rain", "snows": "snowflakes"}
"""Words that stand in one phrase alone ("while it …"), so that predicting text tells nothing of them apart: their embeddings had come
to be one, and the transformer drew either. They have the embeddings of words that it can tell apart."""


def load(run: Run) -> Mistral3ForConditionalGeneration:
    """The trained model."""
    fast = tokenizers_.load(run.work)
    model = build(fast)
    load_ema(run.path("language.safetensors"), model)
    words, ids = model.get_input_embeddings().weight, fast.get_vocab()
    with torch.no_grad():
        for word, other in READ_AS.items():
            if f"Ġ{word}" in ids and f"Ġ{other}" in ids:
                words[ids[f"Ġ{word}"]] = words[ids[f"Ġ{other}"]]
    return model


TOLD = [*(len(classes(name)) for name, _ in QUESTIONS), len(PLACES) + 1, *[27] * 6]
"""How many answers each question has: those of :mod:`scenes`, where the sign is, and its letters."""


def told(scene: Scene) -> list[int]:
    """What a :class:`Teller` has to say of ``scene``; 0 stands for no sign and no letter."""
    word = scene.sign.word if scene.sign else ""
    letters = [ord(word[i]) - 64 if i < len(word) else 0 for i in range(6)]
    return [*answers(scene), PLACES.index(scene.sign.place) + 1 if scene.sign else 0, *letters]


class Teller(nn.Module):
    """One cross-attention from a query per question to the hidden states that the transformer will read."""

    HEADS, WIDTH = 4, 128

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(TOLD), self.WIDTH))
        self.key_value = nn.Linear(features, 2 * self.WIDTH)
        self.answer = nn.Linear(self.WIDTH, max(TOLD))
        self.which = nn.Parameter(torch.ones(len(TOLD), self.WIDTH))
        limit = torch.arange(max(TOLD)) < torch.tensor(TOLD)[:, None]
        self.register_buffer("impossible", ~limit, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, L, features] -> logits [B, questions, answers]."""
        heads = (self.HEADS, self.WIDTH // self.HEADS)
        k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in self.key_value(hidden).chunk(2, -1))
        q = self.query.unflatten(-1, heads).transpose(0, 1).expand(len(hidden), -1, -1, -1)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.answer(seen * self.which).float().masked_fill(self.impossible, -1e4)


def line(rng: random.Random) -> tuple[str, list[int]]:
    """A line to read, and what it tells of its scene (-100 for a line that the transformer never reads)."""
    scene = random_scene(rng)
    kind = rng.random()
    if kind < 0.6:
        text = caption(scene, rng) if rng.random() < 0.75 else rich(scene, rng)
        return f"<s>[DESCRIBE][INST]{text}[/INST]", told(scene)
    unasked = [-100] * len(TOLD)
    if kind < 0.95:
        brief = short(scene, rng) if rng.random() < 0.7 else caption(scene, rng)
        return f"<s>[REWRITE][INST]{brief}[/INST]{rich(scene, rng)}</s>", unasked
    text = caption(scene, rng)
    return f"<s>[EDIT][INST]{text}[/INST]{text}</s>", unasked


def batches(run: Run, fast: PreTrainedTokenizerFast, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    inner: Tokenizer = fast.backend_tokenizer
    inner.no_padding()
    rng = random.Random()
    while True:
        lines = [line(rng) for _ in range(BATCH)]
        rows = [e.ids[:LENGTH] for e in inner.encode_batch([text for text, _ in lines], add_special_tokens=False)]
        ids = torch.full((BATCH, LENGTH), fast.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        right = torch.tensor([answer for _, answer in lines])
        yield ids.to(device), (ids != fast.pad_token_id).long().to(device), right.to(device)


def loss_of(model: Mistral3ForConditionalGeneration, ids: Tensor, mask: Tensor, right: Tensor) -> Tensor:
    """Next tokens, and what captions tell."""
    with mixed(ids.device.type):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        hidden = torch.cat([out.hidden_states[i] for i in OUT_LAYERS], -1)[:, :TEXT_TOKENS]
        telling = model.teller(hidden)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    following = nn.functional.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), targets.flatten())
    return following + nn.functional.cross_entropy(telling.flatten(0, 1), right.flatten())


def train(run: Run) -> None:
    fast = tokenizers_.load(run.work)
    model = build(fast).to(run.device)
    for p in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        p.requires_grad_(False)
    model.teller = Teller(len(OUT_LAYERS) * model.config.text_config.hidden_size).to(run.device)
    trainer = Trainer(run, "language", model, lr=2e-3, muon=4e-3, ema=0.999)

    def report(step: int) -> None:
        rng = random.Random(HELD_OUT_SEED + step)
        with averaged(trainer), torch.no_grad():
            ids, mask, right = next(batches(run, fast, run.device))
            print(f"language: step {step} loss {loss_of(model, ids, mask, right):.3f}", flush=True)
            for _ in range(2):
                prompt = short(random_scene(rng), rng)
                ids = fast(f"<s>[REWRITE][INST]{prompt}[/INST]", return_tensors="pt", add_special_tokens=False)
                out = model.generate(
                    **ids.to(run.device), max_new_tokens=90, do_sample=True, temperature=0.6, pad_token_id=0
                )
                print(
                    f"language: {prompt} -> {fast.decode(out[0, ids['input_ids'].shape[1] :], skip_special_tokens=True)}",
                    flush=True,
                )

    trainer.fit(batches(run, fast, run.device), lambda *batch: loss_of(model, *batch), report)
