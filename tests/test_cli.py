"""The command line, as a person or a script meets it."""

import base64
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flux2_local import Cancelled, Flux2, errors, explore, files, images
from flux2_local.cli import app
from flux2_local.cli.errors import EXIT_CODES, report
from flux2_local.errors import Flux2Error, RequestError

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
    assert [i["url"] for i in answer["images"]] == [(tmp_path / name).as_uri() for name in ("b.jpg", "b-2.jpg")]
    assert all((tmp_path / i["file_name"]).stat().st_size == i["file_size"] for i in answer["images"])


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


@pytest.fixture
def asked(monkeypatch):
    """Fields and loading arguments of what would have been generated."""
    calls = []
    monkeypatch.setattr("flux2_local.cli.generate.run", lambda fields, loading, *_: calls.append((fields, loading)))
    return calls


def kept(path, **settings):
    settings = {"variant": "standard", "prompt": "a boat", "seed": 18, **settings}
    path.write_bytes(images.encode(Image.new("RGB", (64, 64)), images.format_of(path, ""), settings))
    return path


def test_a_turbo_picture_can_be_repeated_and_a_standard_one_as_turbo(tmp_path, monkeypatch):
    loaded = []

    def load(**loading):
        loaded.append((loading["variant"], loading.get("acceleration")))
        raise Cancelled("far enough")

    monkeypatch.setattr("flux2_local.pipeline.Flux2.load", load)
    turbo = kept(tmp_path / "a.png", variant="turbo", acceleration="regular", steps=8)
    standard = kept(tmp_path / "b.png", acceleration="high", steps=28, num_inference_steps=28)
    for arguments in ([turbo], [standard], [standard, "-v", "turbo"], [turbo, "-v", "standard"]):
        done = invoke("generate", "-o", tmp_path, "--from", *arguments)
        assert isinstance(done.exception, Cancelled), done.exception
    assert loaded == [("turbo", "regular"), ("standard", "high"), ("turbo", None), ("standard", None)]
    refused = invoke("generate", "-o", tmp_path, "--from", turbo, "-a", "high")
    assert "acceleration cannot be set on the turbo variant" in str(refused.exception) and len(loaded) == 4


def test_a_plan_knows_a_single_files_base(monkeypatch):
    asked = []
    monkeypatch.setattr(explore, "choose", lambda model, *rest: asked.append((model, rest[-1])) or 1 / 0)
    answer = CliRunner().invoke(app, ["plan", "-m", "one.gguf", "--base", "models/dev"])
    assert isinstance(answer.exception, ZeroDivisionError) and asked == [("one.gguf", "models/dev")]


def test_a_user_who_is_not_there_is_no_home():
    assert files.home("~nobody-at-all/a.png") == Path("~nobody-at-all/a.png")
    assert files.home("~/a.png") == Path.home() / "a.png"


def test_a_single_file_is_loaded_with_its_base_again(tmp_path, asked):
    path = kept(tmp_path / "a.png", model="one.gguf", base="models/dev")
    for more in ([], ["--base", "other"], ["-m", "klein-4b"]):
        assert invoke("generate", "--from", path, *more).exit_code == 0
    found = [(loading["model"], loading.get("base")) for _, loading in asked]
    assert found == [("one.gguf", "models/dev"), ("one.gguf", "other"), ("klein-4b", None)]


def test_an_expanded_prompt_is_not_expanded_again(tmp_path, asked):
    path = kept(tmp_path / "a.png", enable_prompt_expansion=True, expanded_prompt="a red boat at dusk")
    for more in ([], ["a dog"], ["--expand"]):
        assert invoke("generate", "--from", path, *more).exit_code == 0
    found = [(fields["prompt"], fields["enable_prompt_expansion"]) for fields, _ in asked]
    assert found == [("a red boat at dusk", False), ("a dog", True), ("a boat", True)]


def test_the_outputs_ending_is_the_format_of_a_repeated_picture(tmp_path, asked):
    path = kept(tmp_path / "a.jpg", output_format="jpeg")
    for more in (["-o", tmp_path / "b.png"], [], ["-o", tmp_path], ["-f", "webp"]):
        assert invoke("generate", "--from", path, *more).exit_code == 0
    assert [fields["output_format"] for fields, _ in asked] == ["png", "jpeg", "jpeg", "webp"]


def test_references_that_cannot_be_had_again_are_named(tmp_path, asked):
    reference = tmp_path / "in.png"
    Image.new("RGB", (64, 64)).save(reference)
    for name in (reference, reference.as_uri(), "https://host/a.png"):
        assert invoke("generate", "--from", kept(tmp_path / "a.png", images=[str(name)])).exit_code == 0
    for name in ("Image", tmp_path / "gone.png"):
        done = invoke("generate", "--from", kept(tmp_path / "a.png", images=[str(name)]))
        assert "not here any more; name them with --image" in str(done.exception)
    assert len(asked) == 3


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


def test_settings_name_the_base_of_a_single_file_and_references_that_have_a_name(tmp_path, dev_folder):
    model = dev_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    source, data = tmp_path / "in.png", io.BytesIO()
    Image.new("RGB", (100, 100)).save(source)
    Image.new("RGB", (64, 64)).save(data, "PNG")
    url = f"DATA:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    fields = {"num_inference_steps": 4, "image_size": "square", "enable_safety_checker": False}
    result = Flux2.load(model, base=dev_folder).generate("a boat", images=[source, str(source), url], **fields)
    settings = result.images[0].settings
    assert settings["images"] == [str(source), str(source), "str"] and settings["base"] == str(dev_folder)


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
        (["x", "-o", "x.gif", "--format", "jpeg"], 6, r".gif"),
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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.png", "nowhere.png cannot be read"),
        ("~nobody-of-that-name/x.png", "cannot be read"),
        ("https://host/my cat.png", "' ' is written %20"),
        ("http://[x/a.png", "Invalid IPv6 URL"),
    ],
)
def test_a_reference_that_is_not_there_is_refused_before_loading(tmp_path, dev_folder, capsys, source, words):
    with pytest.raises(RequestError, match=words):
        app(["edit", "x", "-i", source, "-m", str(dev_folder), "-o", str(tmp_path), *FAST], standalone_mode=False)
    assert "loading" not in capsys.readouterr().err


def test_every_error_has_an_exit_code(capsys):
    for kind in (one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Flux2Error)):
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


def test_an_interrupted_download_says_that_it_goes_on(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flux2_local.download.download", interrupted)
    done = invoke("download", "klein-4b")
    assert isinstance(done.exception, Cancelled) and "What has arrived is kept" in str(done.exception)


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
