"""``scripts/profile_step.py``: what a picture's time is attributed to."""

import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from flux2_local import Flux2
from flux2_local.cache import StepCache
from flux2_local.stages import Run
from scripts import profile_step
from scripts.profile_step import PART, STAGE, Kernel

STEPS, BLOCKS = 4, 5


@pytest.fixture(scope="module")
def profiled(dev_folder, tmp_path_factory):
    trace = tmp_path_factory.mktemp("profile") / "trace.json"
    flux = Flux2.load(dev_folder, acceleration="none", device="cpu")
    size = {"width": 512, "height": 512}
    request = {
        "prompt": "a",
        "seed": 0,
        "image_size": size,
        "num_inference_steps": STEPS,
        "enable_safety_checker": False,
    }
    before = Run.stage, StepCache.rest, StepCache.keep
    found = profile_step.profiled(flux, request, trace)
    assert (Run.stage, StepCache.rest, StepCache.keep) == before, "profiling outlasts the profile"
    return *found, trace


def test_every_operation_and_linear_layer_is_a_part(profiled):
    rows, _, steps, _ = profiled
    calls = {(row.part, row.name): row.calls for row in rows if row.stage == "denoise"}
    parts = {part for part, _ in calls}
    assert steps == STEPS
    assert {"modulated_norm", "residual_norm", "qk_norm_rope", "swiglu", "attend"} <= parts
    assert {"transformer_blocks.attn.to_q", "single_transformer_blocks.attn.to_qkv_mlp_proj", "proj_out"} <= parts
    assert calls["attend", "aten::scaled_dot_product_attention"] == STEPS * BLOCKS
    assert any(row.stage == "decode" and row.part == "decoder.conv_in" for row in rows)


def test_the_parts_add_up_to_the_stage(profiled):
    rows, walls, _, _ = profiled
    for stage in ("denoise", "decode"):
        assert 0.8 < sum(row.ms for row in rows if row.stage == stage) / walls[stage] <= 1.001


def test_the_trace_is_for_chrome(profiled):
    names = {event.get("name") for event in json.loads(profiled[-1].read_text())["traceEvents"]}
    assert {STAGE + "denoise", PART + "attend"} <= names


def event(name, parent=None, **more):
    facts = {"device_type": DeviceType.CPU, "kernels": [], "self_cpu_time_total": 5.0}
    return SimpleNamespace(name=name, cpu_parent=parent, **(facts | more))


def test_on_a_card_kernels_count_and_the_hosts_time_does_not():
    stage = event(STAGE + "denoise", kernels=[SimpleNamespace(name=STAGE + "denoise", duration=9000.0)])
    outer = event(PART + "transformer_blocks", stage)
    inner = event(PART + "swiglu", outer, kernels=[SimpleNamespace(name="fused", duration=1000.0)])
    op = event("aten::mul", inner, kernels=[SimpleNamespace(name="mul", duration=2000.0)] * 2)
    on_device = event("mul", device_type=DeviceType.CUDA, kernels=[SimpleNamespace(name="mul", duration=1.0)])
    rows = profile_step.kernels([stage, outer, inner, op, op, on_device], on_card=True)
    assert rows == [Kernel("denoise", "swiglu", "mul", 4, 8.0), Kernel("denoise", "swiglu", "fused", 1, 1.0)]


def test_the_table_is_per_step_and_small_things_are_summed_up():
    rows = [Kernel("denoise", "attend", "flash", 8, 7.99), Kernel("denoise", "cache", "add", 4, 0.01)]
    lines = profile_step.table(rows, 16.0, "denoise", 4).splitlines()
    assert lines[0] == "## denoise: 4.00 ms a step, 50% of it in kernels"
    assert lines[4:] == [
        "| **attend** | 99.9% | 2 | 1.998 |",
        "| — flash | 99.9% | 2 | 1.998 |",
        "| 1 smaller parts | 0.1% | 1 | 0.003 |",
    ]
