"""Models whose references attend to themselves alone: keys and values are computed once, and pictures are the KV pipeline's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from test_models import pair
from test_offload import streaming
from test_parity import by_diffusers, by_us, pictures, same
from test_plan import card, need
from torch.utils.flop_counter import FlopCounterMode

from flux2_local import Flux2, costs, footprint, store
from flux2_local.costs import Work
from flux2_local.explore import family_architecture
from flux2_local.latents import image_positions, reference_positions, text_positions
from flux2_local.model.meta import meta
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import REFERENCE, Rotary
from flux2_local.model.transformer import Flux2Transformer, Modulation
from flux2_local.plan import make_plan
from flux2_local.presets import models

SIZE = 512, 528


@pytest.fixture(scope="module")
def both(klein_kv_folder):
    """The model's folder loaded by diffusers and by us, in the exact tier."""
    pipe = Flux2KleinKVPipeline.from_pretrained(klein_kv_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, Flux2.load(klein_kv_folder, acceleration="none")


@pytest.mark.parametrize("images", [None, pictures()], ids=["text", "references"])
def test_pixels_are_the_pipelines(both, images):
    pipe, flux = both
    (want,) = by_diffusers(pipe, [7], SIZE, images)
    (got,) = by_us(flux, 7, 1, SIZE, images)
    assert np.asarray(want).std() > 20 and same(want, got)


def test_references_matter_and_differently_from_those_of_other_models(both, klein_folder):
    """The same weights with references that are read in every step give another picture."""
    _, flux = both
    (got,) = by_us(flux, 7, 1, SIZE, pictures())
    (other,) = by_us(flux, 7, 1, SIZE, pictures()[::-1])
    (read,) = by_us(Flux2.load(klein_folder, acceleration="none"), 7, 1, SIZE, pictures())
    for one in (other, read):
        assert (np.asarray(one.image) != np.asarray(got.image)).mean() > 0.1


def test_pictures_made_together_share_what_is_kept(klein_kv_folder, monkeypatch):
    flux = Flux2.load(klein_kv_folder, dtype="float32", quantize="none")
    alone = by_us(flux, 7, 2, SIZE, pictures())
    plan = flux._plan_for
    monkeypatch.setattr(flux, "_plan_for", lambda *asked: replace(plan(*asked), batch=2))
    net, seen = flux._components.transformer, []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    together = by_us(flux, 7, 2, SIZE, pictures())
    assert seen == [(2, 32 * 33)] * 4, "the picture's own tokens, in every step"
    assert all(same(a.image, b) for a, b in zip(alone, together, strict=True))


def test_streamed_blocks_come_once_more_for_the_references(klein_kv_folder):
    wanted = by_us(Flux2.load(klein_kv_folder), 7, 1, SIZE, pictures())[0].image
    flux, (link, _) = streaming(klein_kv_folder, (0, 3))
    assert np.array_equal(by_us(flux, 7, 1, SIZE, pictures())[0].image, wanted)
    blocks = [block.size for block in flux._components.hold_transformer.blocks]
    moved = (link.copied - sum(blocks)) / sum(size for number, size in enumerate(blocks) if number not in (0, 3))
    assert 4 <= moved <= 5, "one pass for the references and four steps, of which the first brings what stays"


@pytest.mark.parametrize("table", [REFERENCE, NATIVE], ids=["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_is_diffusers_own(table, dtype):
    """Its first step, which reads the references, and one of those that take what was kept."""
    theirs, ours = pair(False, dtype)
    for block in theirs.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in theirs.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    ours.ops = table
    generator = torch.Generator().manual_seed(0)
    grid, sizes = (5, 7), [(3, 2), (2, 5)]
    own, text = (torch.randn(2, n, c, generator=generator).to(dtype) for n, c in ((35, 32), (11, 48)))
    references = torch.randn(1, 16, 32, generator=generator).to(dtype)
    text_ids, ids, others = text_positions(11), image_positions(*grid), reference_positions(sizes)
    rotary = ours.rotary(torch.cat([text_ids, ids, others]))
    with torch.inference_mode():
        kept = ours.keys_and_values(
            references, ours.modulation(torch.zeros((), dtype=dtype), None), rotary.rows(46, 62)
        )
        common = {"encoder_hidden_states": text, "txt_ids": text_ids, "return_dict": False}
        cache = None
        for sigma in (0.9375, 0.5):
            time = torch.full((2,), sigma).to(dtype)
            if cache is None:
                tokens, places = torch.cat([references.expand(2, -1, -1), own], 1), torch.cat([others, ids])
                mode = {"kv_cache_mode": "extract", "num_ref_tokens": 16}
                want, cache = theirs(tokens, timestep=time, img_ids=places, **mode, **common)
            else:
                (want,) = theirs(own, timestep=time, img_ids=ids, kv_cache_mode="cached", kv_cache=cache, **common)
            mod = ours.modulation(time, None)
            got = ours(own, ours.context(text), mod, rotary.rows(0, 46), 35, kept=kept)
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error <= (1e-5 if dtype == torch.float32 else 2e-2)
    for one, layer in zip(kept, cache.double_block_caches + cache.single_block_caches, strict=True):
        for mine, its in ((one.keys, layer.k_ref[:1]), (one.values, layer.v_ref[:1])):
            assert (mine.float() - its.float()).norm() <= (
                1e-5 if dtype == torch.float32 else 2e-2
            ) * its.float().norm()


def test_every_model_of_the_pipeline_is_recognised(klein_kv_folder):
    preset = store.find(klein_kv_folder, "flash").preset
    assert (
        preset.references_once and preset.guidance == "none" and list(preset.variants) == ["standard", "turbo", "flash"]
    )
    assert [m.name for m in models().values() if m.references_once] == ["klein-9b-kv"]


def test_flops_are_those_that_torch_counts():
    arch, work = family_architecture(models()["klein-9b-kv"]), Work(512, 640, references=((1024, 768), (512, 512)))
    own, width = arch.transformer, arch.transformer.width
    text, image, others = arch.text_tokens, arch.tokens(512, 640), arch.reference_tokens(work)
    with meta(), torch.device("meta"), torch.no_grad():
        net = Flux2Transformer(own)
        rotary = Rotary(*torch.empty(2, text + image + others, own.attention_head_dim // 2))
        parts = tuple(torch.empty(1, 1, width) for _ in range(17))
        mod = Modulation(parts[:6], parts[6:12], parts[12:15], parts[15:])
        with FlopCounterMode(display=False) as reading:
            kept = net.keys_and_values(torch.empty(1, others, own.in_channels), mod, rotary.rows(0, others))
        with FlopCounterMode(display=False) as step:
            tokens = torch.empty(1, image, own.in_channels), torch.empty(1, text, width)
            net(*tokens, mod, rotary.rows(0, text + image), image, kept=kept)
    assert abs(costs.step_flops(arch, work) / step.get_total_flops() - 1) < 0.001
    assert abs(costs.reference_flops(arch, work) / reading.get_total_flops() - 1) < 0.001


def test_steps_cost_less_and_what_is_kept_is_counted():
    work = Work(1024, 1024, 4, references=((1024, 1024),) * 2)
    usual, once = (make_plan(need(name, work=work), card("24GiB")) for name in ("klein-9b", "klein-9b-kv"))
    assert once.step_seconds < usual.step_seconds / 2 and once.place_seconds > 0
    assert once.seconds < 0.6 * usual.seconds
    arch = family_architecture(models()["klein-9b-kv"])
    setup = footprint.Setup(arch, "bfloat16", "cuda", ops="triton")
    alone, more = (footprint.sampling(setup, replace(work, references=((1024, 1024),) * count)) for count in (0, 1))
    assert 2 * 32 * 4096 * 4096 * 2 <= more - alone <= 1.02 * 2 * 32 * 4096 * 4096 * 2, "blocks, tokens, width, bytes"
