"""One large picture on several cards, by diffusers' context parallelism: every card holds the transformer and computes its
share of the tokens (Ulysses attention).

    torchrun --nproc-per-node 2 scripts/large_picture.py "a lighthouse at dusk" -o lighthouse.png --model dev --size 2048 2048

This is diffusers' own pipeline, in bfloat16 on cards and float32 on processors, on a model that is on this disk. The number of
processes must divide the picture's tokens, the prompt's and the attention heads.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from flux2_local import files, images, store
from flux2_local.errors import BackendUnavailableError, Flux2Error, RequestError
from flux2_local.load import architecture
from flux2_local.request import make_request


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".png, .jpg or .webp")
    parser.add_argument("--model", required=True, help="a name or a folder, in the hub layout")
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, help="default the model's own")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def check(args: argparse.Namespace, checkpoint: store.Checkpoint, world: int) -> None:
    """Make sure that the work divides, before anything is loaded.

    Raises:
        Flux2Error: it does not, there are no cards, or the picture cannot be written.
    """
    width, height = args.size
    fields = {"prompt": args.prompt, "image_size": {"width": width, "height": height}, "seed": args.seed}
    make_request("standard", fields)
    images.format_of(args.output, "png")
    files.check_folder(args.output.absolute().parent, 2**20)
    if world > 1 and not torch.accelerator.device_count():
        raise BackendUnavailableError("diffusers' context parallelism needs cards; torch finds none on this machine.")
    arch = architecture(checkpoint)
    heads, text = arch.transformer.num_attention_heads, arch.text_tokens
    for what, number in (("tokens", arch.tokens(width, height)), ("prompt tokens", text), ("attention heads", heads)):
        if number % world:
            raise RequestError(f"{world} processes do not divide {number} {what}. Start another number with torchrun.")


def draw(args: argparse.Namespace, checkpoint: store.Checkpoint, device: torch.device) -> images.Image.Image:
    """The picture; every process gets it."""
    from diffusers import ContextParallelConfig, Flux2KleinPipeline, Flux2Pipeline

    preset = checkpoint.preset
    kind = {"Flux2Pipeline": Flux2Pipeline, "Flux2KleinPipeline": Flux2KleinPipeline}[preset.pipeline]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = kind.from_pretrained(checkpoint.folder, dtype=dtype)
    reading = {"max_sequence_length": preset.text_tokens, "text_encoder_out_layers": preset.text_layers}
    pipe.text_encoder.to(device)
    embedded, _ = pipe.encode_prompt(args.prompt, device=device, **reading)
    pipe.text_encoder = None  # it leaves the card before the transformer comes
    pipe.to(device)
    if dist.get_world_size() > 1:
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    pipe.set_progress_bar_config(disable=dist.get_rank() > 0)
    width, height = args.size
    picture: images.Image.Image = pipe(
        prompt_embeds=embedded,
        width=width,
        height=height,
        num_inference_steps=args.steps or preset.recipe("standard").steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
        **reading,
    ).images[0]
    return picture


def main() -> None:
    args = parse()
    checkpoint = store.find(args.model, "standard")
    if "RANK" not in os.environ:
        raise RequestError(f"Start it with torchrun --nproc-per-node N {__file__} …, N being the number of cards.")
    check(args, checkpoint, int(os.environ["WORLD_SIZE"]))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        picture = draw(args, checkpoint, device)
        if dist.get_rank() == 0:
            settings = {
                "model": checkpoint.source,
                "prompt": args.prompt,
                "seed": args.seed,
                "guidance_scale": args.guidance,
            }
            files.write(args.output, images.encode(picture, images.format_of(args.output, "png"), settings))
            print(args.output)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
