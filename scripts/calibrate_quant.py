"""What quantization costs: of each format on normal numbers, or of each layer on the activations of a model's own pictures.

    python scripts/calibrate_quant.py                                         the losses in flux2_local/quant/formats.py
    python scripts/calibrate_quant.py --model tiny --format builtin-int8      a model's layers, and its row of the table

The second prints the relative output error of every layer that the format would cover, worst first, then the line for
``configs/quantization.toml`` with those above the format's threshold.
"""

from __future__ import annotations

import argparse

import torch

from flux2_local import Flux2
from flux2_local.hardware import probe
from flux2_local.load import DTYPES
from flux2_local.quant import FORMATS, find, recipe_for
from flux2_local.quant.convert import backend
from flux2_local.quant.measure import errors

CHANNELS, ROWS, COLUMNS = 3072, 256, 192
PROMPTS = (
    "a lighthouse at dusk",
    "a red ball on the left and a blue box on the right on a green meadow by day",
    'a wooden sign that says "HELLO" on a snowy field at dawn',
    "a purple house with pine trees in the rain",
)


def losses() -> None:
    """Print each usable format's relative output error on normal rows and weights."""
    hardware, draw = probe(), torch.Generator().manual_seed(0)
    device = torch.device(hardware.device)
    weight = torch.randn((COLUMNS, CHANNELS), generator=draw) / CHANNELS**0.5
    x = torch.randn((1, ROWS, CHANNELS), generator=draw).bfloat16()
    want = x.float() @ weight.T
    for form in FORMATS.values():
        reason = form.reason_against(hardware, "bfloat16")
        if (
            reason is not None and form.backend != "builtin"
        ):  # the builtin formats have a reference that runs everywhere
            print(f"{form.name:<22} {reason}")
            continue
        layer = backend(form).quantize(weight, form, torch.bfloat16, device).to(device)
        error = (layer(x.to(device)).float().cpu() - want).norm() / want.norm()
        print(f"{form.name:<22} {float(error):.4f}  (table: {form.loss})", flush=True)


def layers(model: str, name: str, size: str) -> None:
    """Print each layer's error while ``model`` draws :data:`PROMPTS`."""
    flux = Flux2.load(model, quantize="none")
    form = find(name, flux.hardware, flux.plan.dtype)
    c, dtype = flux._components, DTYPES[flux.plan.dtype]

    def draw() -> None:
        for seed, prompt in enumerate(PROMPTS):
            flux.generate(prompt, seed=seed, image_size=size, enable_safety_checker=False)

    for component, network in (("transformer", c.transformer), ("text_encoder", c.text_encoder)):
        recipe = recipe_for(form, flux.checkpoint.name, component)
        found = errors(network, recipe.keeping({}), draw, dtype, c.device)
        for layer, error in found.items():
            print(f"{error:.4f}  {component}.{layer}", flush=True)
        keep = list(recipe.keeping(found).keep)
        print(f"[{form.name}.keep.{flux.checkpoint.name}]\n{component} = {keep}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's name, id or folder; none measures the formats themselves")
    parser.add_argument("--format", default="builtin-int8", choices=list(FORMATS))
    parser.add_argument("--size", default="square")
    args = parser.parse_args()
    if args.model is None:
        losses()
    else:
        layers(args.model, args.format, args.size)


if __name__ == "__main__":
    main()
