"""The README keeps its word: every file is in its map, and every command it shows exists."""

import importlib
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from flux2_local.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def file_map() -> str:
    return README.split("## File map", 1)[1].split("\n## ", 1)[0]


def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return [n for n in names if (ROOT / n).is_file()]


def test_every_module_is_in_the_file_map():
    text = file_map()
    missing = []
    for name in sources():
        path = Path(name)
        if path.parts[0] in ("flux2_local", "kernels", "configs", "scripts", "benchmarks") and path.suffix in (
            ".py",
            ".toml",
        ):
            if path.name == "__init__.py":
                continue
            if f"`{name}`" not in text and f"`{path.parent}/`" not in text:
                missing.append(name)
    assert not missing


def test_the_file_map_names_only_what_exists():
    for name in re.findall(r"^\| `([^`]+)`", file_map(), re.M):
        assert (ROOT / name).exists(), name


def test_every_command_in_the_readme_exists():
    commands = set(get_command(app).commands)
    for line in re.findall(r"^flux2-local (.+)$", README, re.M):
        first = line.split()[0]
        assert first in commands or first.startswith(('"', "-")), line


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_relative_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_tracked_files_stay_small():
    total = sum((ROOT / name).stat().st_size for name in sources())
    assert total < 32 * 2**20


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_the_tables_of_cards_are_what_the_planner_predicts(number):
    written = README.split("<!-- cards -->\n")[1].split("<!-- /cards -->\n")[0].removesuffix("\n").split("\n\n")
    script = runpy.run_path(str(ROOT / "scripts" / "card_table.py"))
    assert len(written) == len(script["TABLES"])
    assert written[number] == script["table"](script["TABLES"][number]).removesuffix("\n")


def test_the_table_of_a_million_pictures_is_what_the_planner_predicts(tmp_path):
    command, table = README.split("echo ", 1)[1].split("```", 1)
    rows = re.findall(r"^ *\| `([\w-]+)` \| ([\d ]+) \| ([\d.]+) days \|", table.split("\n\n")[1], re.M)
    prompt, options = re.match(r'"(.+)" \| flux2-local (.+?) --device', command).groups()
    assert len(rows) == 4
    for device, hourly, days in rows:
        arguments = [*options.split(), "-o", str(tmp_path), "--device", device, "--json"]
        told = json.loads(CliRunner().invoke(app, arguments, input=prompt).stdout)
        assert (f"{told['pictures_per_hour']:,.0f}".replace(",", " "), f"{told['seconds'] / 86400:.1f}") == (
            hourly,
            days,
        )
        assert f"{told['bytes'] / 2**40:.1f} TiB" in README


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]), ids=lambda path: path.stem
)
def test_every_script_finds_what_it_imports(path):
    importlib.import_module(f"{path.parent.name}.{path.stem}")
