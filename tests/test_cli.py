"""The command line, as a person or a script meets it."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flux2_local import images
from flux2_local.cli import app
from flux2_local.cli.errors import EXIT_CODES, report
from flux2_local.errors import Flux2Error

FAST = ["--size", "512x512", "--steps", "4", "--no-safety-checker"]
COMMAND = [sys.executable, "-c", "from flux2_local.cli import main; main()"]


def call(*arguments, cwd=None, **more):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=240, **more
    )


def invoke(*arguments):
    """In this process: quicker; errors of ours come back as the exception."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_bare_prompt_generates(tmp_path, dev_folder):
    done = call("a red boat", "-m", dev_folder, "--seed", 7, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "outputs" / "a-red-boat-7.png"
    assert Image.open(path).size == (512, 512)
    assert "outputs/a-red-boat-7.png  seed 7" in done.stdout and "denoising" in done.stdout
    assert "standard, regular" in done.stderr and "torchao" not in done.stderr


def test_the_bundled_model_says_that_it_is_one(tmp_path):
    done = call("a ball", "--variant", "flash", "-o", tmp_path / "x.webp", "--size", "square")
    assert done.returncode == 0, done.stderr
    assert "bundled model" in done.stderr and "flux2-local download klein-4b" in done.stderr
    assert Image.open(tmp_path / "x.webp").format == "WEBP"


def test_json_is_one_object(tmp_path, dev_folder):
    done = invoke(
        "generate", "a boat", "-m", dev_folder, "-n", 2, "-o", tmp_path / "b.jpg", "--seed", 1, "--json", *FAST
    )
    answer = json.loads(done.stdout)
    assert answer["seed"] == 1 and len(answer["images"]) == 2 and answer["timings"]["inference"] > 0
    assert [i["file_name"] for i in answer["images"]] == ["b.jpg", "b-2.jpg"]
    assert all(i["content_type"] == "image/jpeg" for i in answer["images"])
    assert (tmp_path / "b-2.jpg").exists()


def test_a_picture_can_be_shown_and_repeated(tmp_path, dev_folder):
    first, second, third = (tmp_path / f"{n}.png" for n in "abc")
    arguments = ("-m", dev_folder, "--seed", 3, "-g", 4.5, *FAST)
    assert invoke("generate", "a boat", "-o", first, *arguments).exit_code == 0
    shown = invoke("show", first)
    assert "guidance_scale           4.5" in shown.stdout and "a boat" in shown.stdout
    assert json.loads(invoke("show", first, "--json").stdout)["seed"] == 3
    assert invoke("generate", "--from", first, "-o", second).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    assert invoke("generate", "--from", first, "--seed", 4, "-o", third).exit_code == 0
    assert images.read_settings(third)["seed"] == 4 and images.read_settings(third)["guidance_scale"] == 4.5
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(third)))


def test_edit_takes_references(tmp_path, dev_folder):
    source = tmp_path / "in.png"
    Image.effect_noise((100, 100), 80).convert("RGB").save(source)
    done = invoke(
        "edit",
        "make it blue",
        "-i",
        source,
        "-m",
        dev_folder,
        "-o",
        tmp_path / "o.png",
        "--size",
        "square",
        "--steps",
        4,
    )
    assert done.exit_code != 0, "the safety check is on and there is none"
    done = invoke("generate", "make it blue", "-i", source, "-m", dev_folder, "-o", tmp_path / "o.png", *FAST)
    assert done.exit_code == 0 and images.read_settings(tmp_path / "o.png")["images"] == [str(source)]
    source.unlink()
    assert invoke("generate", "--from", tmp_path / "o.png").exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["x", "--size", "100x100"], 2, "512 to 2048"),
        (["x", "--variant", "turbo", "--steps", "5"], 2, "num_inference_steps"),
        (["x", "--variant", "flash", "--acceleration", "high"], 2, "acceleration"),
        (["x", "--variant", "ultra"], 2, "standard, turbo, flash"),
        (["", "--variant", "flash"], 2, "prompt"),
        (["generate"], 2, "prompt is missing"),
        (["x", "--model", "nope"], 3, "no model"),
        (["x", "--model", "dev"], 3, "download dev"),
        (["x", "--model", "model.ckpt"], 3, "pickle"),
        (["x", "--device", "cuda:9"], 4, "CUDA"),
        (["x", "-o", "x.gif"], 6, r".gif"),
        (["x", "-o", "x.png", "--format", "jpeg"], 2, "say different things"),
        (["plan", "--ram", "lots"], 2, "--ram: 'lots' is not an amount of memory"),
        (["plan", "--ram", "0GiB"], 2, "--ram: '0GiB' is no memory at all"),
        (["plan", "--vram", "0"], 2, "vram: '0' is no memory at all"),
        (["plan", "--device", "cpu", "--ram", "64MiB"], 4, "64.0 MiB may be used"),
        (["show", "nowhere.png"], 2, "cannot be read"),
        (["--from", "nowhere.png"], 2, "cannot be read"),
        (["download", "tiny"], 3, "bundled"),
        (["x", "--nonsense"], 2, "nonsense"),
        (["plan", "--device", "rtx-9999"], 4, "rtx-4090"),
    ],
)
def test_mistakes_end_in_one_line_and_a_code(tmp_path, arguments, code, words):
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_a_target_that_cannot_be_written_is_refused_before_loading(tmp_path, dev_folder):
    (tmp_path / "file").write_text("x")
    done = call("x", "-m", dev_folder, "-o", tmp_path / "file" / "x.png", *FAST)
    assert done.returncode == 6 and "is no folder" in done.stderr and "loading" not in done.stderr


def test_a_reference_that_is_not_there_is_refused_before_loading(tmp_path, dev_folder):
    done = call("edit", "x", "--image", "nowhere.png", "-m", dev_folder, *FAST, cwd=tmp_path)
    assert done.returncode == 2 and "nowhere.png cannot be read" in done.stderr and "loading" not in done.stderr


def test_every_error_has_an_exit_code(capsys):
    def leaves(kind):
        return [leaf for sub in kind.__subclasses__() for leaf in leaves(sub)] or [kind]

    for kind in leaves(Flux2Error):
        error = kind("words", 1) if kind.__name__ == "BudgetError" else kind("words")
        assert report(error) in {code for _, code in EXIT_CODES}
        assert capsys.readouterr().err == "flux2-local: words\n"
    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError())


def test_interrupting_leaves_nothing_behind(tmp_path):
    arguments = ["a ball", "--size", "2048x2048", "--steps", "50", "-a", "none", "-o", str(tmp_path / "x.png")]
    code = (
        "import signal, sys, flux2_local.cli.progress as p\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background inherits it ignored
        "old = p.Display.__call__\n"
        "def new(self, r):\n"
        "    old(self, r)\n"
        "    if r.step == 1: print('STEP', flush=True)\n"
        "p.Display.__call__ = new\n"
        "from flux2_local.cli import main; main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "STEP\n"
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Stopped; nothing was written." in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert time.perf_counter() - start < 60


def test_plan_explains_this_machine_and_others(dev_folder):
    here = invoke("plan", "-m", dev_folder).stdout
    assert "placement" in here and "predicted" in here and "dtype" in here
    there = invoke("plan", "--device", "rtx-4090", "--ram", "32GiB", "-m", "klein-4b", "-v", "turbo").stdout
    assert "klein-4b, turbo" in there and "at most" in there and "weighed, quickest first" in there
    facts = json.loads(invoke("plan", "-m", dev_folder, "--json").stdout)
    assert facts["transformer"]["format"] in ("float32", "bfloat16") and facts["seconds"] > 0


def test_models_and_doctor():
    text = invoke("models").stdout
    assert all(name in text for name in ("dev", "klein-9b", "klein-4b", "tiny")) and "Apache-2.0" in text
    rows = json.loads(invoke("models", "--json").stdout)
    assert rows[0]["name"] == "dev" and rows[0]["state"] == "not here, gated"
    text = invoke("doctor").stdout
    assert "torch" in text and "sdpa" in text and "usable" in text and "instructions" in text
    assert set(json.loads(invoke("doctor", "--json").stdout)) >= {"hardware", "versions", "backends"}


def test_help_names_every_option_and_command():
    top = invoke("--help").stdout
    assert all(
        name in top for name in ("generate", "edit", "plan", "models", "download", "doctor", "show", "Exit codes")
    )
    text = invoke("generate", "--help").stdout
    for option in (
        "--model",
        "--variant",
        "--size",
        "--seed",
        "--image",
        "--lora",
        "--vram",
        "--from",
        "--json",
        "--expand",
    ):
        assert option in text


def test_the_prompt_may_come_from_standard_input(tmp_path, dev_folder):
    done = call("-", "-m", dev_folder, "-o", tmp_path / "x.png", *FAST, input="a red boat\n")
    assert done.returncode == 0 and images.read_settings(tmp_path / "x.png")["prompt"] == "a red boat"
