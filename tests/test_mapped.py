"""Weights that stay in their files on a CPU: the same pixels in less memory than the weights take, and the seconds of reading them."""

import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_budget import FIELDS, bytes_of, planned
from test_mapping import COLUMNS, COUNT, LAYER, SLACK, linux, read, shard  # noqa: F401
from test_plan import need

from flux2_local import BudgetError, Flux2, footprint
from flux2_local.candidates import SYSTEM_RESERVE
from flux2_local.costs import Work
from flux2_local.hardware import DISK_RATE, from_preset
from flux2_local.lora import Lora
from flux2_local.mapping import backed
from flux2_local.offload.mapped import Mapped
from flux2_local.plan import Wishes, make_plan
from flux2_local.presets import parse_bytes
from flux2_local.quant import builtin, disk


def pixels(flux):
    return np.asarray(flux.generate("a red boat", **FIELDS).images[0].image)


@pytest.mark.parametrize("quantize", ["none", "builtin-int8"])
def test_a_budget_that_does_not_hold_the_weights_gives_the_same_pixels(dev_folder, tmp_path, monkeypatch, quantize):
    monkeypatch.setattr(disk, "folder", lambda: tmp_path)
    flux = Flux2.load(dev_folder, dtype="float32", quantize=quantize)
    wanted, plan = pixels(flux), planned(flux).plan
    assert plan.transformer.placement == plan.text_encoder.placement == "resident"
    networks = flux._components.transformer, flux._components.text_encoder
    budget = plan.peak_bytes + SYSTEM_RESERVE["cpu"] - sum(map(bytes_of, networks)) // 3
    flux.settings = replace(flux.settings, vram=budget)
    for file in tmp_path.iterdir():
        file.unlink()  # so that it is made anew, and then without all of it in memory
    made, most = weakref.WeakSet(), []

    def watched(*given, quantized=builtin.quantize):
        layer = quantized(*given)
        made.add(layer)
        most.append(len(made))
        return layer

    monkeypatch.setattr(builtin, "quantize", watched)
    small = planned(flux).plan
    assert small.transformer.placement == small.text_encoder.placement == "streamed" and "mapped" in str(small)
    assert small.peak_bytes <= budget - SYSTEM_RESERVE["cpu"] < plan.peak_bytes
    assert np.array_equal(pixels(flux), wanted)
    hold = flux._components.hold_transformer
    assert isinstance(hold, Mapped) and not hold._reading and hold.stay == set(small.transformer.stay)
    assert all(backed(leaf) for block in hold.blocks for leaf in block.plain)
    assert (quantize == "none" and not most) or (len(most) > 100 and max(most) <= 2)


@linux
@pytest.mark.parametrize("stay", [(), (2, 9, 16)])
def test_only_what_is_computed_with_is_in_memory(shard, stay):  # noqa: F811
    def resident():
        return 1024 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))[1])

    net, first, most = read(shard), resident(), []
    hold = Mapped(net, stay)
    x = torch.ones(1, COLUMNS, dtype=torch.bfloat16)
    with hold(), torch.inference_mode():
        for _ in range(2):
            for number, layer in enumerate(net.layers):
                layer(x)
                most.append(resident() - first - LAYER * sum(n <= number for n in stay))
                if len(most) > COUNT:
                    most[-1] -= LAYER * sum(n > number for n in stay)
    assert LAYER / 2 < max(most) < 2 * LAYER + SLACK and COUNT * LAYER > 8 * LAYER
    assert resident() - first < SLACK


def test_a_plan_for_a_cpu_that_is_short_of_memory():
    """int8, since the files' 16 bit are not what this one computes in."""
    work = Work(256, 256)
    for size, some in (("11GiB", True), ("32GiB", False)):
        hardware = from_preset("cpu-8", parse_bytes(size))
        plan = make_plan(need("klein-9b", work=work), hardware, Wishes(vram=parse_bytes(size), quantize="builtin-int8"))
        assert (plan.transformer.placement == "streamed") == some, size
        assert plan.peak_bytes <= parse_bytes(size) - SYSTEM_RESERVE["cpu"]
    assert "mapped" in [option.name for option in plan.options][-1]


def test_the_disk_decides_where_little_stays():
    rates = {"bfloat16": 1e13, "float32": 1e12}
    hardware = replace(from_preset("cpu-8", parse_bytes("32GiB")), fast_dtypes=("bfloat16",), flops=rates)
    plan = make_plan(need("dev", work=Work(256, 256)), hardware, Wishes(quantize="none"))
    assert plan.dtype == "bfloat16" and plan.transformer.placement == "streamed"
    blocks = footprint.weights(need("dev").arch, "transformer", "bfloat16").blocks
    moving = sum(size for number, size in enumerate(blocks) if number not in plan.transformer.stay)
    assert moving > 20e9 and plan.step_seconds == pytest.approx(moving / DISK_RATE, rel=0.1)
    with pytest.raises(BudgetError):  # what a LoRA is merged into is made in memory
        make_plan(need("dev", work=Work(256, 256)), hardware, Wishes(quantize="none", adapters=(Lora(Path("a")),)))
