"""Chat templates and token ids against transformers' own."""

import pytest
from components import MISTRAL_TEMPLATE, QWEN_TEMPLATE, tokenizer
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from flux2_local import WeightsDamagedError
from flux2_local.load import system_messages
from flux2_local.text.encode import PromptStyle, tokenize
from flux2_local.text.tokenizer import ChatTokenizer

PROMPTS = ["a red boat", "", 'a sign "Grüße 猫"\nand more', "x" * 300, "no [IMG] here"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_dev_prompts(tmp_path, side):
    theirs = tokenizer(MISTRAL_TEMPLATE, side)
    theirs.save_pretrained(tmp_path)
    style = PromptStyle(SYSTEM_MESSAGE, parts=True, prompt_next=False, special=False, length=256)
    got = tokenize(ChatTokenizer(tmp_path), PROMPTS, style)
    want = theirs.apply_chat_template(
        format_input(PROMPTS, SYSTEM_MESSAGE),
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=256,
    )
    assert got.ids.tolist() == want["input_ids"].tolist()
    assert got.mask.tolist() == want["attention_mask"].tolist()
    assert got.cut


@pytest.mark.parametrize("side", ["left", "right"])
def test_klein_prompts(tmp_path, side):
    theirs = tokenizer(QWEN_TEMPLATE, side)
    theirs.save_pretrained(tmp_path)
    style = PromptStyle(None, parts=False, prompt_next=True, special=True, length=128)
    got = tokenize(ChatTokenizer(tmp_path), PROMPTS[:3], style)
    for i, prompt in enumerate(PROMPTS[:3]):
        chat = [{"role": "user", "content": prompt}]
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        want = theirs(text, padding="max_length", truncation=True, max_length=128)
        assert got.ids[i].tolist() == want["input_ids"] and got.mask[i].tolist() == want["attention_mask"]
    assert not got.cut


def test_system_messages_are_the_makers():
    assert system_messages()["SYSTEM_MESSAGE"] == SYSTEM_MESSAGE
    assert {"SYSTEM_MESSAGE_UPSAMPLING_T2I", "SYSTEM_MESSAGE_UPSAMPLING_I2I"} <= set(system_messages())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    tokenizer(QWEN_TEMPLATE, "right").save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WeightsDamagedError, match="tokenizer"):
        ChatTokenizer(tmp_path)
