"""The README's tables of cards: predicted seconds and peak device memory per card, model and variant, in the tiers that differ.

python scripts/card_table.py            print them
python scripts/card_table.py --write    put them between the README's markers
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flux2_local.candidates import Need
from flux2_local.costs import Work
from flux2_local.errors import BudgetError
from flux2_local.explore import family_architecture
from flux2_local.hardware import from_preset
from flux2_local.plan import Plan, make_plan
from flux2_local.presets import devices, models, show_bytes, tiers
from flux2_local.request import Acceleration, Variant

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- cards -->\n", "<!-- /cards -->\n"
TABLES: tuple[tuple[tuple[str, Variant], ...], ...] = (
    (("dev", "flash"), ("dev", "turbo"), ("dev", "standard")),
    (("klein-4b", "flash"), ("klein-4b", "turbo"), ("klein-4b-base", "standard")),
    (("klein-9b", "flash"), ("klein-9b", "turbo"), ("klein-9b-base", "standard")),
)


def cell(device: str, model: str, variant: Variant) -> str:
    """What to expect of one model and variant on one card, at 1024×1024: with acceleration "regular", and "high" where it is another
    plan."""
    regular, high = (expected(device, model, variant, tier) for tier in ("regular", "high"))
    return regular if high == regular else f"{regular}<br>high: {high}"


def expected(device: str, model: str, variant: Variant, tier: Acceleration) -> str:
    """Seconds, memory and how, or the smallest budget."""
    preset = models()[model]
    work = Work(1024, 1024, preset.recipe(variant).steps)
    need = Need(model, variant, tiers()[tier], family_architecture(preset), work)
    try:
        plan = make_plan(need, from_preset(device))
    except BudgetError as error:
        return f"needs {show_bytes(error.smallest)}"
    seconds = f"{plan.seconds:.1f} s" if plan.seconds < 100 else f"{plan.seconds / 60:.0f} min"
    return ", ".join((seconds, show_bytes(plan.peak_bytes), *how(plan)))


def how(plan: Plan) -> list[str]:
    """What is not as the model's makers would run it, where there is room for everything."""
    form = [] if plan.transformer.format == plan.dtype else [plan.transformer.format.removeprefix("builtin-")]
    held = plan.transformer.placement, plan.text_encoder.placement
    placed = {("resident", "resident"): "", ("resident", "streamed"): "text streamed"}.get(held, held[0])
    if placed and devices()[plan.device].kind == "cpu":
        placed = "mapped"
    elif set(plan.transformer.mapped) - set(plan.transformer.stay):
        placed += ", part from disk"
    return [*form, *([placed] if placed else []), *(["steps skipped"] if plan.cache else [])]


def tables() -> str:
    """Markdown, a table for each of :data:`TABLES`."""
    return "\n".join(table(columns) for columns in TABLES)


def table(columns: tuple[tuple[str, Variant], ...]) -> str:
    """A row per device."""
    head = [f"`{model}` {name(model, variant)}" for model, variant in columns]
    lines = ["| card | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for device, preset in devices().items():
        lines.append(
            f"| {preset.title} (`{device}`) | " + " | ".join(cell(device, *column) for column in columns) + " |"
        )
    return "\n".join(lines) + "\n"


def name(model: str, variant: Variant) -> str:
    """The variant, with those that are the same recipe."""
    recipes = models()[model].variants
    own = [v for v, recipe in recipes.items() if recipe == recipes[variant]]
    return f"{' and '.join(own)}, {recipes[variant].steps} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    if not parser.parse_args().write:
        print(tables(), end="")
        return
    text = README.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + tables() + END + after, "utf-8")


if __name__ == "__main__":
    main()
