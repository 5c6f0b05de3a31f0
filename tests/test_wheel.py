"""A wheel built from a clean clone, installed in an empty venv outside the repository, does the main job."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **env):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run("git", "clone", "--quiet", ROOT, folder / "clone", cwd=folder)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "clone",
        cwd=folder,
    )
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} <= {"flux2_local", "flux2_kernels"}
    for wanted in (
        "flux2_local/configs/models.toml",
        "flux2_local/tiny/model_index.json",
        "flux2_local/tiny/README.md",
    ):
        assert wanted in names
    assert wheel.stat().st_size < 28e6


def test_the_wheel_runs_the_main_job(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies come from the environment that runs the tests; the package itself must not.
    site = next(home.glob("lib/python*/site-packages"))
    outer = Path(sysconfig.get_paths()["purelib"])
    (tmp_path / "dependencies").mkdir()
    for entry in outer.iterdir():
        if "flux2" not in entry.name and entry.suffix != ".pth":
            (tmp_path / "dependencies" / entry.name).symlink_to(entry)
    (site / "dependencies.pth").write_text(str(tmp_path / "dependencies"))
    where = run(python, "-c", "import flux2_local; print(flux2_local.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(home)
    out = run(home / "bin" / "flux2-local", "a lighthouse at dusk", "--variant", "flash", "--seed", "1", cwd=tmp_path)
    path = tmp_path / "outputs" / "a-lighthouse-at-dusk-1.png"
    assert str(path.name) in out and Image.open(path).size == (1024, 768)
