"""The three networks against diffusers' and transformers' own, on the same weights."""

from itertools import pairwise

import pytest
import torch
from components import (
    MISTRAL_TEMPLATE,
    QWEN_TEMPLATE,
    TRANSFORMER,
    autoencoder,
    language_numbers,
    randomised,
    tokenizer,
)
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from flux2_local import load, store
from flux2_local.latents import image_positions, noise, pack, reference_positions, text_positions, unpack
from flux2_local.load import language_name
from flux2_local.model.autoencoder import Autoencoder, AutoencoderConfig, patchify, starts, unpatchify
from flux2_local.model.language import LanguageConfig, LanguageModel
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.weights import fill, fitting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pair(guidance_embeds: bool, dtype: torch.dtype):
    """diffusers' transformer and ours with the same weights."""
    theirs = randomised(
        Flux2Transformer2DModel(**TRANSFORMER, joint_attention_dim=48, guidance_embeds=guidance_embeds), 1
    )
    theirs = theirs.to(dtype).eval()
    ours = Flux2Transformer(TransformerConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.to(dtype).eval()


def run_both(theirs, ours, dtype, batch, grid, references, guidance, sigma=0.625):
    height, width = grid
    generator = torch.Generator().manual_seed(0)
    count, extra = height * width, sum(h * w for h, w in references)
    latents = torch.randn(batch, count + extra, 32, generator=generator).to(dtype)
    text = torch.randn(batch, 11, 48, generator=generator).to(dtype)
    img_ids = torch.cat([image_positions(height, width), reference_positions(references)])
    txt_ids = text_positions(11)
    scale = None if guidance is None else torch.full((batch,), guidance)
    with torch.inference_mode():
        want = theirs(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=torch.full((batch,), sigma).to(dtype),
            guidance=scale,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0][:, :count]
        mod = ours.modulation(torch.full((batch,), sigma).to(dtype), guidance)
        got = ours(latents, ours.context(text), mod, ours.rotary(torch.cat([txt_ids, img_ids])), count)
    return want, got


@pytest.mark.parametrize("references", [[], [(3, 2), (2, 5)]])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 1)])
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_transformer_is_bit_exact_in_float32(guidance_embeds, grid, references):
    theirs, ours = pair(guidance_embeds, torch.float32)
    want, got = run_both(theirs, ours, torch.float32, 1, grid, references, 2.5 if guidance_embeds else None)
    assert want.std() > 0.1
    if grid == (1, 1) and references:  # one row of several: a matrix-vector product, which rounds in another order
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(want, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_transformer_rounds_as_the_reference(dtype, batch):
    theirs, ours = pair(True, dtype)
    want, got = run_both(theirs, ours, dtype, batch, (6, 5), [], 4.0)
    assert got.dtype == dtype and torch.isfinite(got).all()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (want.float() - got.float()).norm() / want.float().norm() <= tolerance


def test_a_modulation_table_row_serves_every_picture_of_a_batch():
    _, ours = pair(True, torch.float32)
    one, many = (ours.modulation(torch.full((n,), 0.5), 2.5) for n in (1, 3))
    for a, b in zip(
        one.img + one.txt + one.single + one.out, many.img + many.txt + many.single + many.out, strict=True
    ):
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-5, atol=1e-6)


def test_autoencoder_is_bit_exact_in_float32():
    theirs = autoencoder()
    ours = Autoencoder(AutoencoderConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    assert ours.multiple == 16
    pixels = torch.rand(1, 3, 96, 144) * 2 - 1
    with torch.inference_mode():
        mean, std = ours.statistics(torch.float32)
        want = (Flux2Pipeline._patchify_latents(theirs.encode(pixels).latent_dist.mode()) - mean) / std
        got = ours.encode(pixels)
        assert torch.equal(want, got)
        assert torch.equal(theirs.decode(Flux2Pipeline._unpatchify_latents(got * std + mean)).sample, ours.decode(got))


def test_decoding_in_tiles_is_close_to_decoding_whole():
    """Groups are normalised per tile: where tiles have the statistics of the whole, as here, only borders differ."""
    vae = load.build_vae(store.find("tiny", "standard"), torch.float32)
    latents = torch.randn(1, 128, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, tiled = vae.decode(latents), vae.decode(latents, 512)
        assert torch.equal(vae.decode(latents, 1024), whole)  # one tile covers it
    error = tiled - whole
    assert tiled.shape == whole.shape == (1, 3, 768, 1024)
    assert 0 < error.std() < 0.1 * whole.std()
    # No column stands out as a seam: nowhere does the error jump by as much as neighbouring columns differ anyway.
    assert error.diff(dim=3).abs().mean((0, 1, 2)).max() < whole.diff(dim=3).abs().mean()


@pytest.mark.parametrize(("length", "side"), [(14, 6), (11, 6), (6, 6), (3, 6), (100, 16)])
def test_tiles_cover_everything_and_overlap(length, side):
    begin = starts(length, side)
    assert begin[0] == 0 and begin[-1] + side >= length and len(set(begin)) == len(begin)
    assert all(b - a <= side - side // 4 for a, b in pairwise(begin))


def test_patchify_is_the_pipelines_and_back():
    z = torch.randn(2, 8, 6, 10)
    assert torch.equal(patchify(z), Flux2Pipeline._patchify_latents(z))
    assert torch.equal(unpatchify(patchify(z)), z)


def language_pair(kind: str):
    tok = tokenizer(MISTRAL_TEMPLATE if kind == "mistral" else QWEN_TEMPLATE, "right")
    numbers = language_numbers(6, len(tok))
    if kind == "mistral":
        vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 1, "head_dim": 8, "image_size": 32, "patch_size": 16}
        text = {"model_type": "mistral", "sliding_window": None, **numbers}
        theirs = Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
        )
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**numbers))
    randomised(theirs, 3).eval()
    config = LanguageConfig.from_dict(theirs.config.to_dict())
    with torch.device("meta"):
        ours = LanguageModel(config, (1, 3, 5))
    fill(ours, fitting(ours, iter(theirs.state_dict().items()), "test", language_name), dtype=torch.float32)
    return theirs, ours


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_language_model_is_bit_exact_in_float32(kind, side):
    theirs, ours = language_pair(kind)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if side != "none":
        where = slice(0, 7) if side == "left" else slice(13, 20)
        ids[0, where], mask[0, where] = 0, 0
    with torch.inference_mode():
        states = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        want = torch.cat([states[k] for k in (1, 3, 5)], -1)
        got = ours(ids, mask)
    assert torch.equal(want, got)


def test_noise_is_the_pipelines_in_every_dtype():
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(11)
        want = torch.randn(1, 32, 6, 7, generator=generator, dtype=dtype)
        assert torch.equal(noise(11, 32, 6, 7).to(dtype), want)


def test_positions_are_the_pipelines():
    z = torch.zeros(1, 4, 3, 5)
    assert torch.equal(image_positions(3, 5), Flux2Pipeline._prepare_latent_ids(z)[0])
    assert torch.equal(text_positions(7), Flux2Pipeline._prepare_text_ids(torch.zeros(1, 7, 2))[0])
    sizes = [(2, 3), (4, 1), (1, 1)]
    want = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 4, h, w) for h, w in sizes])[0]
    assert torch.equal(reference_positions(sizes), want)


def test_pack_and_unpack_are_inverse():
    z = torch.randn(2, 4, 3, 5)
    assert torch.equal(pack(z), Flux2Pipeline._pack_latents(z))
    assert torch.equal(unpack(pack(z), 3, 5), z)
