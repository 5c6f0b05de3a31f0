"""diffusers' own pipelines on the same components, as they come and as their documentation speeds them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import costs, load, store
from ..errors import BudgetError, ModelError
from ..hardware import probe, usable_cores
from ..presets import show_bytes
from .subject import GUIDANCE, Loaded, Subject, Told

if TYPE_CHECKING:
    from ..presets import ModelPreset

Change = Callable[[Any, Subject], None]
"""Makes a stock pipeline, still on the host, faster or smaller, and places it."""


def plain(pipe: Any, subject: Subject) -> None:
    """Nothing but placing it."""
    pipe.to(subject.device)


def pipeline(subject: Subject, change: Change | None = None) -> Loaded:
    """The checkpoint's pipeline class with the checkpoint's components.

    Args:
        subject: what to load.
        change: None for the pipeline as it comes, in float32 on a CPU and bfloat16 elsewhere; else what is done to it, in the
            16-bit type that the device runs fast (float32 where it runs none).
    """
    fast = probe(subject.device).fast_dtypes[0]
    dtype = fast if change is not None else "float32" if subject.kind == "cpu" else "bfloat16"
    pipe, preset = from_disk(subject, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    (change or plain)(pipe, subject)

    def draw(prompt: str, seed: int, steps: int | None = None) -> tuple[np.ndarray, Told]:
        picture = pipe(
            prompt=prompt,
            width=subject.width,
            height=subject.height,
            num_inference_steps=steps or subject.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=preset.text_tokens,
            text_encoder_out_layers=preset.text_layers,
        ).images[0]
        return np.asarray(picture), Told(skipped=blocks_skipped(pipe.transformer))

    compiles = any(module._compiled_call_impl is not None for module in pipe.transformer.modules())
    facts = {"dtype": dtype, "steps": subject.steps, "compiles": compiles}
    return Loaded(draw, facts | {"products": PRODUCTS.get(change, dtype)})


def from_disk(subject: Subject, dtype: torch.dtype) -> tuple[Any, ModelPreset]:
    """The pipeline on the host, and how its model is used.

    Raises:
        BudgetError: its weights alone are more than the host's memory.
    """
    import diffusers

    checkpoint = store.find(subject.model, "standard")
    weights = costs.checkpoint_parameters(load.architecture(checkpoint)) * dtype.itemsize
    if weights > (ram := probe("cpu").free):
        raise BudgetError(f"its weights are {show_bytes(weights)}, and {show_bytes(ram)} of memory are free", weights)
    kind = getattr(diffusers, checkpoint.preset.pipeline)
    return kind.from_pretrained(checkpoint.folder, torch_dtype=dtype), checkpoint.preset


def compiled(pipe: Any, subject: Subject) -> None:
    """Regional compilation, as diffusers' documentation has it."""
    plain(pipe, subject)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


def cache_dit(pipe: Any, subject: Subject) -> None:
    """cache-dit's one line, with its default policy: it computes eight blocks of each kind to judge a step by, or one where
    there are not as many."""
    import cache_dit as package

    plain(pipe, subject)
    package.enable_cache(pipe, cache_config=package.DBCacheConfig(Fn_compute_blocks=judging_blocks(pipe.transformer)))


def judging_blocks(transformer: Any) -> int:
    return 8 if transformer.config.num_layers >= 8 else 1


def blocks_skipped(transformer: Any) -> tuple[int, int]:
    """How many times cache-dit left out a double and a single block of the last picture; none where it is not used."""
    lists = transformer.transformer_blocks, transformer.single_transformer_blocks
    steps = [len(getattr(blocks, "_cached_steps", ())) for blocks in lists]
    double, single = (len(blocks) - judging_blocks(transformer) for blocks in lists)
    return steps[0] * double, steps[1] * single


def cache_dit_compiled(pipe: Any, subject: Subject) -> None:
    """The same, with the blocks compiled after caching is enabled, as cache-dit's documentation has it."""
    cache_dit(pipe, subject)
    pipe.transformer.compile_repeated_blocks()


def torchao_int8(pipe: Any, subject: Subject) -> None:
    """torchao's dynamic int8 on the transformer, then compilation, without which it is slower than none."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    _quantize(pipe, subject, Int8DynamicActivationInt8WeightConfig())


def torchao_fp8(pipe: Any, subject: Subject) -> None:
    """torchao's dynamic fp8, a scale per row."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    _quantize(pipe, subject, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


PRODUCTS: dict[Change | None, str] = {torchao_int8: "int8", torchao_fp8: "float8_e4m3fn"}
"""What linear layers multiply in where a change has them multiply in another type than their activations'."""


def _quantize(pipe: Any, subject: Subject, config: Any) -> None:
    from torchao.quantization import quantize_

    plain(pipe, subject)
    quantize_(pipe.transformer, config)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


def model_offload(pipe: Any, subject: Subject) -> None:
    """One network at a time on the card."""
    pipe.enable_model_cpu_offload(device=subject.device)


def sequential_offload(pipe: Any, subject: Subject) -> None:
    """One layer at a time on the card."""
    pipe.enable_sequential_cpu_offload(device=subject.device)


def group_offload(pipe: Any, subject: Subject) -> None:
    """Groups of blocks, the next one fetched while one computes."""
    pipe.enable_group_offload(
        onload_device=torch.device(subject.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )


def stable_diffusion_cpp(subject: Subject) -> Loaded:
    """stable-diffusion.cpp with its 8-bit weights (q8_0, made while loading) and the flags that its page on FLUX.2 names.

    Raises:
        ModelError: the checkpoint lacks a file that it reads (the transformer in Black Forest Labs' naming, or the text encoder
            in one piece), or it does not know the shapes.
    """
    from stable_diffusion_cpp import StableDiffusion

    folder = store.find(subject.model, "standard").folder
    parts = {"diffusion_model_path": folder, "llm_path": folder / "text_encoder", "vae_path": folder / "vae"}
    files = {name: sorted(place.glob("*.safetensors")) for name, place in parts.items()}
    for name, found in files.items():
        if len(found) != 1:
            raise ModelError(
                f"stable-diffusion.cpp reads one .safetensors file in {parts[name]}, and there are {len(found)}."
            )
    try:
        engine = StableDiffusion(
            **{name: str(found[0]) for name, found in files.items()},
            wtype="q8_0",
            diffusion_flash_attn=True,
            n_threads=usable_cores(),
            verbose=False,
        )
    except ValueError as error:
        raise ModelError(
            f"stable-diffusion.cpp cannot load it ({error}). It takes FLUX.2's published autoencoder, heads of 128 channels and "
            "a vocabulary of at least 151669, and says what else is wrong with verbose=True."
        ) from error

    def draw(prompt: str, seed: int, steps: int | None = None) -> tuple[np.ndarray, Told]:
        work = {"width": subject.width, "height": subject.height, "sample_steps": steps or subject.steps}
        (picture,) = engine.generate_image(prompt, **work, cfg_scale=1.0, seed=seed)
        return np.asarray(picture.convert("RGB")), Told()

    return Loaded(draw, {"dtype": "float32", "products": "q8_0", "steps": subject.steps, "compiles": False})
