"""Stage 3: the language model, a small Mistral-3. It reads prompts for the transformer and rewrites short ones.

It learns next-token prediction on two kinds of line, in the chat format that the pipelines use:
``<s>[DESCRIBE][INST] caption [/INST]`` and ``<s>[REWRITE][INST] short [/INST] rich </s>``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from . import tokenizer as tokenizers_
from .captions import caption, rich, short
from .data import HELD_OUT_SEED
from .scenes import random_scene
from .trainer import Run, Trainer, averaged

LENGTH = 128
BATCH = 64
OUT_LAYERS = (1, 3, 5)
"""Hidden states that the transformer reads, as dev reads 10, 20, 30 of 40; the last layer only serves rewriting."""

MODES = ("[DESCRIBE]", "[REWRITE]", "[EDIT]")


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
    # The architecture has a picture encoder; prompts here are text, so it is as small as it can be and never used.
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 16,
    }
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids("<unk>"),
    )
    return Mistral3ForConditionalGeneration(config)


def line(rng: random.Random) -> str:
    scene = random_scene(rng)
    kind = rng.random()
    if kind < 0.5:
        text = caption(scene, rng) if rng.random() < 0.6 else rich(scene, rng)
        return f"<s>[DESCRIBE][INST]{text}[/INST]</s>"
    if kind < 0.95:
        return f"<s>[REWRITE][INST]{short(scene, rng) if rng.random() < 0.7 else caption(scene, rng)}[/INST]{rich(scene, rng)}</s>"
    text = caption(scene, rng)
    return f"<s>[EDIT][INST]{text}[/INST]{text}</s>"


def batches(run: Run, fast: PreTrainedTokenizerFast, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    inner: Tokenizer = fast.backend_tokenizer
    inner.no_padding()
    rng = random.Random(run.seed)
    while True:
        rows = [e.ids[:LENGTH] for e in inner.encode_batch([line(rng) for _ in range(BATCH)], add_special_tokens=False)]
        ids = torch.full((BATCH, LENGTH), fast.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        yield ids.to(device), (ids != fast.pad_token_id).long().to(device)


def loss_of(model: Mistral3ForConditionalGeneration, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def train(run: Run) -> None:
    fast = tokenizers_.load(run.work)
    model = build(fast).to(run.device)
    for p in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        p.requires_grad_(False)
    trainer = Trainer(run, "language", model, lr=2e-3, ema=0.999)

    def report(step: int) -> None:
        rng = random.Random(HELD_OUT_SEED + step)
        with averaged(trainer), torch.no_grad():
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

    trainer.fit(batches(run, fast, run.device), lambda ids, mask: loss_of(model, ids, mask), report)
