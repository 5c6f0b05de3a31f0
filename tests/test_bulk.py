"""Two hundred pictures of the bundled model, interrupted in every way: the files are those of a run without. And one picture
in several processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_batch import contents, lines_in, wait_for_lines

from flux2_local.batch.engines import Pool
from flux2_local.batch.job import Sweep, make_job
from flux2_local.batch.lines import read
from flux2_local.batch.run import Target, open_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = 200
LOADING = {"model": "tiny", "variant": "flash"}
THREADS = 1


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    things = ["a red boat", "a fox", "a yellow house", "a tall tree", "the sun"]
    path = tmp_path_factory.mktemp("bulk") / "prompts.txt"
    path.write_text("".join(f"{things[n % 5]} number {n}\n" for n in range(PROMPTS)), "utf-8")
    return path


def command(prompts, folder, *more):
    options = ["-m", "tiny", "-v", "flash", "--size", "square", "--threads", str(THREADS)]
    code = "from flux2_local.cli import main; main()"
    return [sys.executable, "-c", code, "batch", str(prompts), "-o", str(folder), *options, *more]


@pytest.fixture(scope="module")
def whole(prompts):
    """Every file of a run without interruption."""
    folder = prompts.parent / "whole"
    subprocess.run(command(prompts, folder, "--quiet"), check=True)
    files = contents(folder)
    assert len(files) == PROMPTS + 2, "pictures, manifest.jsonl and batch.json"
    return files


def test_killed_at_ten_random_moments(prompts, whole):
    folder, dice = prompts.parent / "killed", random.Random(11)
    for moment in sorted(dice.sample(range(1, PROMPTS - 10), 10)):
        process = subprocess.Popen(command(prompts, folder, "--resume"), stderr=subprocess.DEVNULL)
        wait_for_lines(process, folder, moment)
        time.sleep(dice.uniform(0, 0.7))
        process.kill()
        process.wait()
        assert moment <= lines_in(folder) < PROMPTS, "it was killed at work"
    subprocess.run(command(prompts, folder, "--resume", "--quiet"), check=True)
    assert contents(folder) == whole


def test_two_workers_of_a_ray_cluster_one_of_them_killed(prompts, whole):
    ray = pytest.importorskip("ray")
    from flux2_local.batch.cluster import cluster_workers, require_ray

    require_ray().init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        workers = cluster_workers({**LOADING, "device": "cpu"}, 2, THREADS)
        job = make_job(read(prompts), Sweep("flash", {"image_size": "square"}))
        killed = []

        def kill(batch):
            ready = [w for w in workers if w.facts]
            if batch.made >= PROMPTS // 3 and len(ready) == 2 and not killed:
                killed.append(ray.get(ready[0]._actor.__ray_call__.remote(lambda self: os.getpid())))
                os.kill(killed[0], signal.SIGKILL)

        with open_batch(job, Target(prompts.parent / "ray")) as batch, Pool(workers, gradual=True) as pool:
            assert batch.settle(pool.facts) == []
            batch.work(pool, kill)
            assert killed and pool.lost == 1 and not batch.failures
    finally:
        ray.shutdown()
    assert contents(prompts.parent / "ray") == whole


def test_one_picture_in_two_processes(tmp_path, tiny):
    """The script for cards, on processors: diffusers only insists that there is an accelerator."""
    script = Path(__file__).parents[1] / "scripts" / "large_picture.py"
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import runpy, sys, torch\n"
        "torch.accelerator.device_count = lambda: 1\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    asked = ["a red boat", "--model", "tiny", "--size", "512", "512", "--steps", "6", "--seed", "3", "-o"]
    without = subprocess.run([*torchrun, script, *asked, tmp_path / "no.png"], capture_output=True, text=True)
    assert without.returncode and "needs cards" in without.stderr
    subprocess.run([*torchrun, runner, *asked, tmp_path / "two.png"], check=True, capture_output=True)
    fields = {"image_size": "square", "num_inference_steps": 6, "seed": 3, "acceleration": "none"}
    alone = np.asarray(tiny.generate("a red boat", **fields).images[0].image).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "two.png")) - alone).max() <= 2
