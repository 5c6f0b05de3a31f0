"""The architecture's rules, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flux2_local"

# Each layer may import the ones after it, and itself.
LAYERS = (
    ("cli", "server", "batch", "bench", "fal", "playground"),
    ("explore", "download", "endpoints"),
    ("pipeline",),
    ("settings", "stages", "many"),
    ("safety", "load"),
    (
        "sampler", "plan", "choices", "candidates", "homes", "footprint", "counting", "text", "lora", "store", "offload", "quant",
        "attention", "cache",
    ),
    ("ceiling", "costs", "hardware", "heap", "rates", "schedule", "segments", "latents"),
    ("model",),
    ("single",),
    ("weights", "result", "images", "files", "frames", "progress"),
    ("mapping",),
    ("presets",),
    ("request",),
    ("errors", "version", "__init__", "__main__"),
)  # fmt: skip


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> set[str]:
    """First components, below flux2_local, of what a module imports when it is imported (not inside functions)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            above = parts[: len(parts) - node.level]
            base = [*above, *(node.module.split(".") if node.module else [])]
            found |= {base[0]} if base else {alias.name for alias in node.names}
    return found


def test_imports_only_point_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("tiny", "configs"):
            continue
        wrong += [f"{own} -> {other}" for other in imports(path) if layer_of(other) < layer_of(own)]
    assert not wrong


def test_kernels_know_nothing_of_the_library():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text("utf-8")
        assert "flux2_local" not in text, path
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow another project's package"


def test_nothing_unpickles():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "import pickle" not in text and "torch.load(" not in text, path


def test_tracked_names_follow_the_rules():
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "helpers", "misc", "common")]
