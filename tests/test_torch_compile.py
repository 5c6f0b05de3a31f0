"""Compiled blocks: the same results, one graph per kind of block for every size, and nothing compiled twice."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from test_plan import need, need_of
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from flux2_local import BackendUnavailableError, Flux2, RequestError, load
from flux2_local import attention as backends
from flux2_local.hardware import from_preset, probe
from flux2_local.model.compiled import compile_blocks, mark
from flux2_local.model.ops import REFERENCE
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.plan import Wishes, built, make_plan
from flux2_local.quant.convert import convert
from flux2_local.quant.recipe import Recipe

CONFIG = TransformerConfig(
    num_layers=2,
    num_single_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=8,
    joint_attention_dim=24,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
TEXT = 6
SIZES = (7, CONFIG.width, CONFIG.mlp_width - TEXT, 2 * CONFIG.width)
"""Image tokens; some equal another dimension, alone or with the text's."""


def network(config=CONFIG):
    net = Flux2Transformer(config)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return net.eval()


@torch.inference_mode()
def forward(net, tokens, batch=1):
    generator = torch.Generator().manual_seed(tokens)
    latents, text = (torch.randn(batch, n, c, generator=generator) for n, c in ((tokens, 8), (TEXT, 24)))
    ids = torch.randint(0, 9, (TEXT + tokens, 4), generator=generator)
    mod = net.modulation(torch.tensor(0.5), 2.5)
    return net(latents, net.context(text), mod, net.rotary(ids), tokens)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_every_size_runs_the_same_two_graphs(fresh, tmp_path, attention):
    net, want = network(), network()
    net.ops = want.ops = replace(REFERENCE, attend=backends.load(attention))
    compile_blocks(net, tmp_path, backend="aot_eager")
    for tokens in SIZES:
        torch.testing.assert_close(forward(net, tokens), forward(want, tokens), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@torch.inference_mode()
def with_references(net, tokens, batch=2):
    """With references as many as the tokens of the smallest size more that are read once."""
    generator = torch.Generator().manual_seed(tokens)
    others = tokens + SIZES[0]
    references, latents = (torch.randn(b, n, 8, generator=generator) for b, n in ((1, others), (batch, tokens)))
    text = torch.randn(batch, TEXT, 24, generator=generator)
    rotary = net.rotary(torch.randint(0, 9, (TEXT + tokens + others, 4), generator=generator))
    mod, clean = (net.modulation(torch.tensor(sigma), 2.5) for sigma in (0.5, 0.0))
    kept = net.keys_and_values(references, clean, rotary.rows(TEXT + tokens, TEXT + tokens + others))
    return net(latents, net.context(text), mod, rotary.rows(0, TEXT + tokens), tokens, kept=kept)


def test_references_that_are_read_once_take_two_graphs_more(fresh, tmp_path):
    net, want = network(), network()
    compile_blocks(net, tmp_path, backend="aot_eager")
    for tokens in SIZES:
        torch.testing.assert_close(with_references(net, tokens), with_references(want, tokens), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_models_that_take_many_graphs_run_side_by_side(fresh, tmp_path):
    """In a thread that loaded none of them: torch's settings hold for one thread."""
    nets = [[network(replace(CONFIG, num_attention_heads=heads)) for _ in range(2)] for heads in (2, 3)]
    for net, want in nets:
        for one in (net, want):
            convert(one, Recipe("builtin-int8"), torch.float32, torch.device("cpu"))
        compile_blocks(net, tmp_path, backend="eager")
    first, second = nets
    calls = [*product([first], (forward, with_references), (1, 2)), (second, forward, 1)]
    with ThreadPoolExecutor(1) as pool:
        for ((net, want), run, batch), tokens in product(calls, SIZES[:2]):
            got = pool.submit(run, net, tokens, batch).result()
            torch.testing.assert_close(got, run(want, tokens, batch), rtol=1e-5, atol=1e-5)
    # Two kinds of block and the last one, whose output is not quantized; the first model's are called in five ways, which are one or
    # two pictures, with or without references, and the references alone.
    assert counters["stats"]["unique_graphs"] == 3 * (5 + 1) and not counters["graph_break"]


def test_code_is_kept_in_the_folder_that_no_one_else_named(fresh, tmp_path, monkeypatch):
    """The compiler's import sets the variable to its default."""
    ours, theirs = (str(tmp_path / name) for name in ("ours", "theirs"))
    for named, used in ((None, ours), (default_cache_dir(), ours), (theirs, theirs)):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        if named:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        compile_blocks(network(), tmp_path / "ours", backend="eager")
        assert cache_dir() == used


PROGRAM = """
import json
from torch._dynamo.utils import counters
from flux2_local import Flux2
flux = Flux2.load("tiny", compile=True)
flux.generate("a boat", image_size="square", num_inference_steps=4, seed=1)
print(json.dumps([counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "hit")]))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    """What the first one kept is read; about a minute on two cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    answers = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    assert answers == [[2, 0], [0, 2]]


def test_it_is_planned_where_it_is_asked_for(dev_folder, monkeypatch):
    hardware = from_preset("cpu-8", 2**36)
    asked, left = (make_plan(need(), hardware, Wishes(compiled=wish)) for wish in (True, None))
    assert (asked.compile, asked.ops) == ("blocks", "reference") and (left.compile, left.ops) == ("off", "native")
    assert built(asked) != built(left) and "compile: off" in str(left) and "not blocks: seconds of tracing" in str(left)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(BackendUnavailableError, match="no C\\+\\+ compiler; install g\\+\\+"):
        make_plan(need_of(dev_folder, "regular"), probe("cpu"), Wishes(compiled=True))


def test_a_model_is_loaded_with_its_blocks_compiled(fresh, dev_folder, monkeypatch, tmp_path):
    """With a backend that only traces, which takes seconds less. What says that code is kept is there when it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(load, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    fields = {"image_size": "square", "num_inference_steps": 4, "seed": 1, "enable_safety_checker": False}
    plain, compiled = (Flux2.load(dev_folder, compile=wish) for wish in (False, True))
    assert not list(tmp_path.rglob("*.mark"))
    pictures = [np.asarray(flux.generate("a boat", **fields).images[0].image).astype(int) for flux in (plain, compiled)]
    assert len(list(tmp_path.rglob("*.mark"))) == 1
    assert counters["stats"]["unique_graphs"] == 2
    assert np.abs(pictures[0] - pictures[1]).mean() < 2


TURING = {"sm": 75, "fast_dtypes": ("float16",), "kind": "cuda"}
"""A card that our kernels do not run on and the compiler's do."""


def compile_choice(tier="regular", requests=1, **wishes):
    card = replace(from_preset("rtx-3060"), **TURING)
    plan = make_plan(need("klein-4b", tier=tier), card, Wishes(requests=requests, **wishes))
    return plan, next(choice for choice in plan.choices if choice.what == "compile")


def test_compiling_is_taken_where_it_pays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, one = compile_choice()
    assert (plan.ops, plan.compile) == ("reference", "off") and "and 1 is expected" in one.rejected[0][1]
    pays = int(one.rejected[0][1].split("pays after ")[1].split(",")[0])
    assert 1 < pays < 1000
    for count, value in ((pays - 1, "off"), (pays + 1, "blocks")):
        plan, choice = compile_choice(requests=count)
        assert plan.compile == choice.value == value
    assert f"each of {pays + 1} requests" in choice.reason and "nothing is kept" in choice.reason
    assert (
        compile_choice("none", 10**6)[0].compile == compile_choice(requests=10**6, compiled=False)[0].compile == "off"
    )


def test_compiling_pays_sooner_where_its_code_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, cold = compile_choice()
    arch = need("klein-4b").arch.transformer
    card = replace(from_preset("rtx-3060"), **TURING)
    kept = mark(arch, card, plan.dtype, plan.transformer.format, plan.ops, plan.attention)
    kept.parent.mkdir(parents=True)
    kept.touch()
    warm = compile_choice()[1]
    count = [int(c.rejected[0][1].split("pays after ")[1].split(",")[0]) for c in (cold, warm) if c.rejected]
    assert warm.value == "blocks" or count[1] < count[0]
    assert "kept from before" in str(warm)
    for other in ({"dtype": "float32"}, {"quantize": "builtin-int4"}):
        assert "nothing is kept" in str(compile_choice(**other)[1])


def test_fused_operations_are_never_compiled_unasked():
    for device in ("rtx-4090", "h200"):
        plan = make_plan(need(), from_preset(device), Wishes(requests=10**9))
        why = next(choice for choice in plan.choices if choice.what == "compile").rejected[0][1]
        assert (plan.ops, plan.compile) == (
            "triton",
            "off",
        ) and "nothing is known to be gained on our operations" in why


def test_what_loading_chose_about_compiling_holds_for_its_requests(dev_folder):
    """Whatever their size: the weights are not loaded anew for it."""
    flux = Flux2.load(dev_folder, requests=3)
    assert flux.settings.requests == 3 and flux.settings.settled.value == "off"
    settled = replace(flux.settings.settled, value="blocks", reason="it pays")
    for tier, value in (("regular", "blocks"), ("none", "off")):
        plan = make_plan(need_of(dev_folder, tier), flux.hardware, replace(flux.settings, settled=settled))
        assert plan.compile == value
    with pytest.raises(RequestError, match="at least 1"):
        Flux2.load(dev_folder, requests=0)
