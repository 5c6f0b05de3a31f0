"""The README's table of cards: predicted seconds and peak device memory per card, model and variant.

python scripts/card_table.py            print it
python scripts/card_table.py --write    put it between the README's markers
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.errors import BudgetError
from flux2_local.explore import family_architecture
from flux2_local.hardware import from_preset
from flux2_local.plan import make_plan
from flux2_local.presets import devices, models, parse_bytes, show_bytes, tiers
from flux2_local.request import Variant

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- cards -->\n", "<!-- /cards -->\n"
COLUMNS: tuple[tuple[str, Variant], ...] = (
    ("klein-4b", "flash"),
    ("klein-9b", "flash"),
    ("dev", "turbo"),
    ("dev", "standard"),
)
RAM = parse_bytes("64GiB")


def cell(device: str, model: str, variant: Variant) -> str:
    """What to expect of one model and variant on one card, at 1024×1024 with acceleration "regular"."""
    preset = models()[model]
    work = Work(1024, 1024, preset.recipe(variant).steps)
    need = Need(model, variant, tiers()["regular"], family_architecture(preset), work)
    try:
        plan = make_plan(need, from_preset(device, RAM))
    except BudgetError as error:
        return f"needs {show_bytes(error.smallest)}"
    seconds = f"{plan.seconds:.1f} s" if plan.seconds < 100 else f"{plan.seconds / 60:.0f} min"
    placement = plan.text_encoder.placement if plan.transformer.placement == "resident" else plan.transformer.placement
    how = {"resident": "", "staged": ", staged", "streamed": ", streamed"}[placement]
    if plan.transformer.placement == "resident" and placement == "streamed":
        how = ", text streamed"
    if placement == "streamed" and devices()[device].kind == "cpu":
        how = ", mapped"
    elif set(plan.transformer.mapped) - set(plan.transformer.stay):
        how += ", part from disk"
    form = "" if plan.transformer.format == plan.dtype else f", {plan.transformer.format.removeprefix('builtin-')}"
    return f"{seconds}, {show_bytes(plan.peak_bytes)}{form}{how}"


def table() -> str:
    """Markdown."""
    head = [f"`{model}` {variant}" for model, variant in COLUMNS]
    lines = ["| card | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for name, preset in devices().items():
        lines.append(f"| {preset.title} (`{name}`) | " + " | ".join(cell(name, *column) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    text = README.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + table() + END + after, "utf-8")


if __name__ == "__main__":
    main()
