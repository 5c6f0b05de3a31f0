"""Flux2.generate: stages, progress, cancelling, repeating, and what happens when something goes wrong."""

import gc
import json
import shutil
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux2_local import (
    Cancelled,
    Flux2,
    Flux2Error,
    OutOfMemoryError,
    Progress,
    Request,
    Result,
    images,
    load,
    pipeline,
)
from flux2_local.model.ops import REFERENCE
from flux2_local.progress import Reporter
from flux2_local.quant import disk
from flux2_local.stages import slug

FAST = {"image_size": "square", "num_inference_steps": 4, "enable_safety_checker": False}


@pytest.fixture(scope="module")
def flux(dev_folder):
    return Flux2.load(dev_folder)


def pixels(result, i=0):
    return np.asarray(result.images[i].image)


def test_the_answer_has_everything(flux, tmp_path):
    result = flux.generate("a red boat", seed=7, num_images=2, **FAST)
    assert isinstance(result, Result) and result.seed == 7 and result.prompt == "a red boat"
    assert result.has_nsfw_concepts == (False, False)
    first, second = result.images
    assert (first.width, first.height, first.content_type) == (512, 512, "image/png")
    assert first.file_name == "a-red-boat-7.png" and second.file_name == "a-red-boat-8.png"
    assert first.file_size == len(first.data) and not np.array_equal(pixels(result, 0), pixels(result, 1))
    t = result.timings
    assert t.encode > 0 and t.denoise > 0 and t.decode > 0
    assert abs(t.inference - (t.encode + t.references + t.denoise + t.decode)) < 1e-9 and t.total >= t.inference
    json.dumps(result.to_dict())
    assert images.read_settings(first.save(tmp_path / "x.png"))["seed"] == 7


def test_a_seed_is_drawn_and_echoed(flux):
    first = flux.generate("a boat", **FAST)
    again = flux.generate("a boat", seed=first.seed, **FAST)
    other = flux.generate("a boat", **FAST)
    assert first.seed < 2**53 and np.array_equal(pixels(first), pixels(again))
    assert other.seed != first.seed and not np.array_equal(pixels(first), pixels(other))


@pytest.mark.parametrize(("form", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(flux, form, kind):
    image = flux.generate("a boat", output_format=form, seed=1, **FAST).images[0]
    assert image.image.format == kind and image.content_type == f"image/{form}"


def test_every_field_reaches_the_picture(flux):
    base = pixels(flux.generate("a boat", seed=1, **FAST))
    for change in ({"guidance_scale": 8.0}, {"num_inference_steps": 5}, {"seed": 2}):
        assert not np.array_equal(pixels(flux.generate(**{"prompt": "a boat", "seed": 1, **FAST, **change})), base), (
            change
        )
    assert not np.array_equal(pixels(flux.generate("a tree", seed=1, **FAST)), base)


def test_a_whole_request_works_as_well(flux):
    request = Request(prompt="a boat", seed=4, image_size="square", num_inference_steps=4, enable_safety_checker=False)
    assert np.array_equal(pixels(flux.generate(request)), pixels(flux.generate("a boat", seed=4, **FAST)))
    assert flux.generate(request, seed=5).seed == 5


def test_sync_mode_gives_data_uris(flux):
    url = flux.generate("a boat", sync_mode=True, **FAST).to_dict()["images"][0]["url"]
    assert images.decode(images.data_url_bytes(url), "x").size == (512, 512)


def test_progress_counts_every_step_of_every_image(flux):
    seen: list[Progress] = []
    flux.generate("a boat", num_images=2, progress=seen.append, **FAST)
    steps = [(p.step, p.total) for p in seen if p.stage == "denoise" and p.step]
    assert steps == [(i, 8) for i in range(1, 9)]
    stages = list(dict.fromkeys(p.stage for p in seen))
    assert stages == ["encode", "denoise", "decode", "finish"]


def test_previews_are_small_pictures_of_what_is_coming(tiny):
    """Of the bundled model: what random weights make of smaller latents is no smaller picture. On the mean of three: a single
    picture's first guess may be nearer than the second."""
    errors, plain = np.zeros(4), 0.0
    for prompt in ("a boat", "a red ball", "a house in the snow"):
        shots = []
        result = tiny.generate(
            prompt,
            seed=3,
            progress=lambda p, shots=shots: shots.append(p.preview()) if p.preview else None,
            **{**FAST, "image_size": "square_hd"},
        )
        assert len(shots) == 4 and all(max(shot.size) <= 512 < result.images[0].width for shot in shots)
        final = np.asarray(result.images[0].image.resize(shots[-1].size)).astype(int)
        one = [np.abs(np.asarray(shot).astype(int) - final).mean() for shot in shots]
        assert min(one) == one[-1], "the last is the nearest"
        errors += one
        plain += np.abs(final - final.mean((0, 1))).mean()
    assert (np.diff(errors) < 0).all(), "each shows more"
    assert errors[0] < plain / 2 and errors[-1] < plain / 5, "all of them show more than the picture's mean colour"


def test_cancelling_stops_within_one_step(flux):
    steps = []
    with pytest.raises(Cancelled):
        flux.generate(
            "a boat", progress=lambda p: steps.append(p.step), cancel=lambda: max(steps, default=0) >= 2, **FAST
        )
    assert max(steps) == 2
    assert flux.generate("a boat", seed=1, **FAST).images, "the pipeline still works"


def test_an_interrupt_leaves_the_pipeline_usable(flux):
    before = pixels(flux.generate("a boat", seed=1, **FAST))

    def stop(report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.generate("a boat", seed=1, progress=stop, **FAST)
    assert np.array_equal(pixels(flux.generate("a boat", seed=1, **FAST)), before)


ANSWER = 48
"""Tokens after which answers end here: random weights never end them."""


@pytest.fixture
def short_answers(monkeypatch):
    from flux2_local.text.expand import Expander, Sampling

    told, draw, answer = [], Sampling.draw, Expander.answer

    def ending(self, scores, generator):
        told.append(draw(self, scores, generator))
        return told[-1] if len(told) <= ANSWER else self.stops[0]

    monkeypatch.setattr(Sampling, "draw", ending)
    monkeypatch.setattr(Expander, "answer", lambda self, *given: (told.clear(), answer(self, *given))[1])


def rewritten(flux, **fields):
    """The answer to "a boat", nothing else of the request being made."""
    run = flux._run({"prompt": "a boat", "enable_prompt_expansion": True, **FAST, **fields}, Reporter())
    flux._adopt(run.plan)
    return run.expand()


@pytest.mark.usefixtures("short_answers")
def test_expansion_uses_the_models_own_language_model(flux):
    result = flux.generate("a boat", seed=3, enable_prompt_expansion=True, **FAST)
    assert result.prompt != "a boat" and result.timings.expand > 0
    assert result.images[0].settings["expanded_prompt"] == result.prompt
    assert result.prompt == flux.generate("a boat", seed=3, enable_prompt_expansion=True, **FAST).prompt
    direct = flux.generate(result.prompt, seed=3, **FAST) if result.prompt.strip() else None
    if direct is not None:
        assert np.array_equal(pixels(direct), pixels(result))


def test_expansion_sends_the_makers_message(flux, monkeypatch):
    from diffusers.pipelines.flux2 import system_messages

    from flux2_local.text.expand import Expander

    said = []
    monkeypatch.setattr(
        Expander, "__call__", lambda self, prompt, system, seed: said.append((prompt, system, seed)) or "rich"
    )
    reference = images.decode(flux.generate("x", **FAST).images[0].data, "x")
    flux.generate("a boat", seed=1, enable_prompt_expansion=True, **FAST)
    flux.generate("a boat", seed=1, enable_prompt_expansion=True, images=[reference], **FAST)
    t2i, i2i = system_messages.SYSTEM_MESSAGE_UPSAMPLING_T2I, system_messages.SYSTEM_MESSAGE_UPSAMPLING_I2I
    assert said == [("a boat", t2i, 1), ("a boat", i2i, 1)]


@pytest.mark.usefixtures("short_answers")
def test_expansion_generates_as_diffusers_does(dev_folder):
    """The same chat and sampling as ``upsample_prompt``, which pads on the left to no effect."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE_UPSAMPLING_T2I
    from transformers import Mistral3ForConditionalGeneration

    got = rewritten(Flux2.load(dev_folder, dtype="float32"), seed=5)
    chat = format_input(["a boat"], SYSTEM_MESSAGE_UPSAMPLING_T2I)
    assert got == transformers_answer(Mistral3ForConditionalGeneration, dev_folder, chat)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("tied", [False, True])
def test_expansion_by_qwen_generates_as_transformers_does(klein_folder, tied, tmp_path):
    """With a head of its own, or the embedding's weights; and drawing as the checkpoint says."""
    from components import language_numbers, randomised
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE_UPSAMPLING_T2I
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path / "klein"
    shutil.copytree(klein_folder, folder)
    if tied:
        shutil.rmtree(folder / "text_encoder")
        config = Qwen3Config(**language_numbers(30, 264), tie_word_embeddings=True)
        randomised(Qwen3ForCausalLM(config), 5).save_pretrained(folder / "text_encoder")
    own = folder / "text_encoder" / "generation_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "eos_token_id": [2, 3], "top_k": 20, "top_p": 0.9}))
    flux = Flux2.load(folder, dtype="float32")
    assert load.architecture(flux.checkpoint).language.tied == tied
    chat = [{"role": "system", "content": SYSTEM_MESSAGE_UPSAMPLING_T2I}, {"role": "user", "content": "a boat"}]
    assert rewritten(flux, seed=5) == transformers_answer(Qwen3ForCausalLM, folder, [chat])


def transformers_answer(cls, folder, chat):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = cls.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    inputs = tok.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", enable_thinking=False
    )
    torch.manual_seed(5)
    out = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=True, temperature=0.15, use_cache=True)
    return tok.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


@pytest.mark.usefixtures("short_answers")
def test_expansion_in_quantized_weights(dev_folder):
    """Which are kept, so that the next request reads them as they are."""
    flux = Flux2.load(dev_folder, quantize="builtin-int8")
    first = rewritten(flux, seed=5)
    kept = list(disk.folder().glob("*-expansion-*.safetensors"))
    assert len(kept) == 1 and first.strip() and rewritten(flux, seed=5) == first
    assert rewritten(Flux2.load(dev_folder, dtype="float32"), seed=5) != first


def test_expansion_can_be_cancelled_between_tokens(flux, monkeypatch):
    from flux2_local.text.expand import Sampling

    drawn, draw = [], Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    with pytest.raises(Cancelled):
        flux.generate("a boat", enable_prompt_expansion=True, cancel=lambda: len(drawn) == 3, **FAST)
    assert len(drawn) == 3


def test_long_prompts_are_cut_and_it_is_said(flux):
    result = flux.generate("boat " * 400, **FAST)
    assert any("512 tokens" in note for note in result.notes)
    assert not any("512 tokens" in note for note in flux.generate("boat", **FAST).notes)


def test_running_out_of_memory_says_what_to_do(flux, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flux._components.transformer, "forward", out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"512×512.*--vram \d+GiB"):
        flux.generate("a boat", **FAST)


def test_running_out_of_memory_is_tried_again_with_less(dev_folder, monkeypatch):
    """Once, with a plan for less, within which whatever follows is planned too."""
    flux = Flux2.load(dev_folder)
    begun, peaks, work = [], [], pipeline.paint

    def crowded(runs):
        begun.append(len(runs[0].pictures))
        peaks.append(runs[0].plan.peak_bytes)
        work(runs)
        if len(begun) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "paint", crowded)
    fields = {**FAST, "image_size": {"width": 1024, "height": 1024}, "seed": 2}
    first = flux.generate("a boat", **fields)
    assert begun == [0, 0] and peaks[1] <= 0.8 * peaks[0] and len(first.images) == 1
    assert any("ran out" in note and "something else uses it" in note for note in first.notes)
    assert first.plan.peak_bytes == peaks[1] and (first.plan.work.width, first.plan.work.height) == (1024, 1024)
    again = flux.generate("a boat", **fields)
    assert peaks[2] == peaks[1] and not any("ran out" in note for note in again.notes)
    assert np.array_equal(pixels(first), pixels(again))


@pytest.mark.parametrize("times", [1, 2, 9])
def test_running_out_of_memory_while_loading_is_tried_again_with_less(dev_folder, times, monkeypatch):
    plans, left, build = [], [], Flux2._build

    def crowded(self, plan, *others):
        assert not any(network() for network in left), "what came before is gone"
        plans.append(plan)
        if len(plans) <= times:
            network = torch.nn.Linear(1, 1)
            network.forward = network.forward  # refers to itself, as what is compiled does
            left.append(weakref.ref(network))
            gc.collect(1)  # as where it has been there for long
            raise RuntimeError("CUDA error: out of memory")
        return build(self, plan, *others)

    monkeypatch.setattr(Flux2, "_build", crowded)
    if times > 1:
        with pytest.raises(OutOfMemoryError, match=r"1024×768.*--vram \d+GiB"):
            Flux2.load(dev_folder)
    else:
        flux = Flux2.load(dev_folder)
        assert flux.plan is plans[1] and any("something else uses it" in note for note in flux.notes)
        assert not any("ran out" in note for note in flux.generate("a boat", **FAST).notes[len(flux.notes) :])
    assert len(plans) == 2 and plans[1].peak_bytes <= 0.8 * plans[0].peak_bytes


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)", True),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("out of resource: shared memory, Required: 131072, Hardware limit: 101376", False),
    ],
)
def test_running_out_of_memory_is_known_by_what_is_said(text, out):
    assert pipeline.is_out_of_memory(RuntimeError(text)) is out


@pytest.mark.parametrize("times", [1, 2])
def test_a_convolution_without_an_engine_is_tried_again_with_less(dev_folder, times, monkeypatch):
    """Memory may have been too short for it; where it was not, nobody is told so."""
    flux, begun, work = Flux2.load(dev_folder), [], pipeline.paint

    def crowded(runs):
        begun.append(runs)
        if len(begun) <= times:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        work(runs)

    monkeypatch.setattr(pipeline, "paint", crowded)
    fields = {**FAST, "image_size": {"width": 1024, "height": 1024}}
    if times == 1:
        assert any("ran out" in note for note in flux.generate("a boat", **fields).notes)
    else:
        with pytest.raises(RuntimeError, match="unable to find an engine"):
            flux.generate("a boat", **fields)
    assert len(begun) == 2


def test_other_errors_are_not_dressed_up(flux, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(flux._components.transformer, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        flux.generate("a boat", **FAST)


def test_another_tier_loads_again_only_where_the_weights_must_change(dev_folder):
    flux = Flux2.load(dev_folder, acceleration="regular", dtype="float32")
    held = flux._components
    high = flux.generate("a boat", acceleration="high", **FAST)
    assert high.images[0].settings["acceleration"] == "high" and flux._components is held
    none = flux.generate("a boat", acceleration="none", **FAST)
    assert flux.plan.acceleration == "none" and flux._components.vae is not held.vae
    assert flux._components.transformer is held.transformer and flux._components.text_encoder is held.text_encoder
    again = next(note for note in none.notes if note.startswith("Loaded again for this request: vae: "))
    assert "convolutions as stored instead of channels-last" in again and "transformer" not in again
    assert np.array_equal(pixels(none), pixels(flux.generate("a boat", acceleration="none", seed=none.seed, **FAST)))


def test_other_operations_take_the_same_weights(dev_folder):
    flux = Flux2.load(dev_folder, dtype="float32")
    held = flux._components
    assert flux.plan.ops != "reference" and held.transformer.ops.residual_norm is not REFERENCE.residual_norm
    assert flux._adopt(replace(flux.plan, ops="reference")) == [], "nothing was read"
    assert flux._components.transformer is held.transformer and flux.plan.ops == "reference"
    assert held.transformer.ops.residual_norm is REFERENCE.residual_norm
    assert flux._adopt(replace(flux.plan, ops="native")) == [] and flux.plan.ops == "native"


def test_a_reload_that_fails_leaves_a_pipeline_that_loads_again(dev_folder, monkeypatch):
    flux, build = Flux2.load(dev_folder, dtype="float32"), Flux2._build
    expected, before, alive = flux.generate("a boat", seed=1, **FAST), flux.plan, []
    flux._components.vae.forward = flux._components.vae.forward  # refers to itself, as what is compiled does
    network = weakref.ref(flux._components.vae)

    def failing(self, plan, before, parts):
        alive.append(network())
        raise RuntimeError("unreadable")

    monkeypatch.setattr(Flux2, "_build", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unreadable"):
            flux.generate("a boat", acceleration="none", **FAST)
    assert flux.plan is before and alive == [None, None], "the old weights had left"
    with pytest.raises(RuntimeError, match="unreadable"):
        next(flux.generate_many([{"prompt": "a boat", "enable_prompt_expansion": True, **FAST}]))
    monkeypatch.setattr(Flux2, "_build", build)
    again = flux.generate("a boat", seed=1, **FAST)
    assert np.array_equal(pixels(expected), pixels(again)) and any("had failed" in note for note in again.notes)
    assert flux.generate("a boat", acceleration="none", **FAST).images and flux.plan.acceleration == "none"


def test_generating_asks_no_network_and_writes_no_file(flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flux.generate("a boat", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_two_threads_do_not_mix_their_pictures(flux):
    """The model is shared; each call's own state is not."""
    want = {seed: pixels(flux.generate("a boat", seed=seed, **FAST)) for seed in (1, 2)}
    got = {}
    threads = [
        threading.Thread(target=lambda s=seed: got.update({s: pixels(flux.generate("a boat", seed=s, **FAST))}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(want[seed], got[seed]) for seed in want)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("A red boat!", "a-red-boat"), ("猫", "image"), ("x" * 90, "x" * 48), ("../../etc/passwd", "etc-passwd")],
)
def test_file_names_are_tame(prompt, name):
    assert slug(prompt) == name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries(
        {"prompt": st.text(max_size=60)},
        optional={
            "guidance_scale": st.floats(-1, 25),
            "seed": st.integers(-1, 2**64),
            "num_inference_steps": st.integers(3, 6),
            "num_images": st.integers(0, 2),
            "output_format": st.sampled_from(["png", "jpeg", "webp", "bmp"]),
            "image_size": st.fixed_dictionaries({"width": st.integers(500, 640), "height": st.integers(500, 640)}),
        },
    )
)
def test_any_request_gives_a_result_or_a_typed_error(flux, fields):
    try:
        result = flux.generate(
            **{"num_inference_steps": 4, "image_size": "square", **fields}, enable_safety_checker=False
        )
    except Flux2Error as error:
        assert str(error)
        return
    assert len(result.images) == fields.get("num_images", 1)
    assert all(np.asarray(image.image).std() > 0 for image in result.images)
