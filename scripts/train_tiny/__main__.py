"""Command line of the recipe: ``python -m scripts.train_tiny STAGE --work DIR --minutes N``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from .trainer import Run

STAGES = {
    "encoder": "pictures -> latents, their principal components (half of AutoencoderKLFlux2)",
    "decoder": "latents -> pictures (the other half)",
    "tokenizer": "byte-level BPE over captions",
    "language": "prompts -> hidden states, short prompts -> rich ones (Mistral-3)",
    "latents": "the transformer's pictures, drawn and encoded once",
    "small": "the transformer, by rectified flow on pictures of 256x256",
    "things": "the same transformer, on larger sizes, around things and signs alone",
    "flow": "the same transformer, on larger sizes, whole pictures, around things and around signs in turn",
    "polish": "the decoder once more, on what the transformer makes of pictures",
    "guidance": "guidance distillation of the transformer",
    "trajectories": "the guided transformer's own paths, for the two step distillations",
    "turbo": "step distillation to 8 steps, a LoRA",
    "flash": "step distillation to 4 steps, a LoRA",
    "export": "everything in the hub layout, 16-bit, into --out",
    "restore": "instead of all before guidance: checkpoints from an exported folder (--out), to go on where they are gone",
    "blend": "after restore and guidance: the guided transformer and the exported one that it went on from, averaged",
}


MODULES = {
    "encoder": "autoencoder",
    "decoder": "autoencoder",
    "small": "flow",
    "things": "flow",
    "flow": "flow",
    "guidance": "flow",
    "blend": "restore",
    "trajectories": "steps",
    "turbo": "steps",
    "flash": "steps",
}
"""Stages that are functions ``train_<stage>`` of these modules; each other one is ``train`` of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_tiny", description=__doc__)
    parser.add_argument("stage", choices=STAGES, help="; ".join(f"{k}: {v}" for k, v in STAGES.items()))
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"), help="data, checkpoints, samples")
    parser.add_argument("--minutes", type=float, default=30, help="how long to train in this call (default 30)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("flux2_local/tiny"), help="where export writes and restore reads"
    )
    parser.add_argument("--share", type=float, default=1, help="of the pictures and paths to draw (default 1)")
    args = parser.parse_args()
    run = Run(args.work, args.minutes, args.device, not args.eager, args.seed, args.out, args.share)
    module = importlib.import_module(f".{MODULES.get(args.stage, args.stage)}", __package__)
    getattr(module, f"train_{args.stage}" if args.stage in MODULES else "train")(run)


if __name__ == "__main__":
    main()
