"""Attention backends: right, refused with a reason where they cannot run, chosen with every loser's reason."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from flux2_kernels import constraint
from test_plan import need
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from flux2_local import BackendUnavailableError, Flux2, RequestError, attention, footprint, load
from flux2_local.attention import BACKENDS, Problem, flash2, flash3, flex, pick, sage, sdpa, trial, xformers
from flux2_local.candidates import LAYOUTS, Draft, Terms
from flux2_local.choices import choose_ops
from flux2_local.cli import app
from flux2_local.counting import Peak, Workspaces
from flux2_local.hardware import Package, from_preset
from flux2_local.model import ops
from flux2_local.model.compiled import reason_against
from flux2_local.model.ops import REFERENCE
from flux2_local.plan import built, explain, make_plan
from flux2_local.presets import tiers

SHAPES = [(1, 1, 1, 8), (2, 37, 3, 16), (1, 129, 5, 24), (1, 77, 2, 128), (3, 65, 1, 64)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ON_CPU = ("sdpa", "sdpa-flash", "sdpa-math")
CUDA = tuple(name for name, b in BACKENDS.items() if "cuda" in b.types)


def draw(shape, dtype):
    """q, k and v; v lies in a packed projection, as in a single block."""
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tokens, 3 * heads * dim, generator=generator).to(dtype)
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in packed.chunk(3, -1))
    return q.contiguous(), k.contiguous(), v


def exact(q, k, v):
    """softmax(q·kᵀ/√d)·v in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def check(attend, shape, dtype, tolerance=None):
    q, k, v = draw(shape, dtype)
    want = exact(q, k, v)
    got = attend(q, k, v)
    assert got.shape == q.shape and got.dtype == dtype
    assert (got.double() - want).abs().max() <= (tolerance or TOLERANCE[dtype]) * want.abs().max()
    batch, tokens, heads, channels = shape
    wide = torch.full((batch, tokens, heads + 2, channels), torch.nan, dtype=dtype)
    place = wide[:, :, 1:-1]
    assert attend(q.clone(), k.clone(), v, place).data_ptr() == place.data_ptr()
    assert torch.equal(place, got) and wide[:, :, [0, -1]].isnan().all()


def problem(sm=None, kind="cuda", dtype="bfloat16", head_dim=128, described=True):
    return Problem("cuda:0", f"a card of SM {sm}" if sm else "a CPU", described, kind, sm, dtype, 4608, 24, head_dim)


def usable(p, tier="high"):
    return {name for name, b in BACKENDS.items() if b.reason_against(p, tiers()[tier]) is None}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_backends_of_the_cpu_compute_attention(name, shape, dtype):
    check(attention.load(name), shape, dtype)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 300, 16, 8), (1, 800, 3, 16)], ids=str)
def test_products_of_matrices_compute_attention(shape):
    """All heads together, in two groups, and one by one."""
    check(attention.load("matmul"), shape, torch.bfloat16, 1.5e-2)


@pytest.mark.parametrize("name", [*ON_CPU, "matmul"])
def test_there_may_be_more_keys_than_queries(name):
    """Where references' keys and values are kept from before."""
    (q, *_), (_, k, v) = draw((2, 37, 3, 16), torch.bfloat16), draw((2, 300, 3, 16), torch.bfloat16)
    want, got = exact(q, k, v), attention.load(name)(q, k, v)
    assert got.shape == q.shape and (got.double() - want).abs().max() <= 1.5e-2 * want.abs().max()


def test_these_are_all_that_run_on_a_cpu():
    assert usable(problem(kind="cpu", dtype="float32")) == set(ON_CPU)
    assert usable(problem(kind="cpu")) == {*ON_CPU, "matmul"}
    assert all(
        "cuda device" in BACKENDS[n].reason_against(problem(kind="cpu"), tiers()["high"]) for n in ("sage", "flex")
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_flex_computes_attention(monkeypatch, shape):
    """Without the compiler, whose fused kernel needs a card."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    check(flex.load(), shape, torch.float32)


def test_a_kernel_named_never_falls_back():
    with pytest.raises(RuntimeError, match="_scaled_dot_product_cudnn_attention"):
        BACKENDS["sdpa-cudnn"].load()(*draw(SHAPES[1], torch.float32))
    assert attention.load("sdpa") is REFERENCE.attend


class Switches(TorchDispatchMode):
    """Which of torch's kernels are switched on while operations run: for the whole process, so in other threads too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cuda = torch.backends.cuda
        on = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled
        self.seen.add(tuple(enabled() for enabled in on))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [b.name for b in sdpa.BACKENDS])
def test_a_kernel_named_leaves_those_of_other_threads_alone(name):
    """On a card that is imagined; and its shapes are attention's."""
    with FakeTensorMode(), Switches() as switches:
        q, k, v = (torch.empty(2, n, 3, 64, dtype=torch.bfloat16, device="cuda") for n in (37, 300, 300))
        got = attention.load(name)(q, k, v)
    assert got.shape == q.shape and got.dtype == q.dtype and switches.seen == {(True,) * 4}


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
def test_a_kernel_named_is_traced_in_one_graph(name):
    check(
        torch.compile(attention.load(name), backend="aot_eager", fullgraph=True, dynamic=True), SHAPES[1], torch.float32
    )


@pytest.mark.parametrize(
    ("backend", "module", "function", "answer"),
    [
        (flash2, "flash_attn", "flash_attn_func", lambda out: out),
        (flash3, "flash_attn_interface", "flash_attn_func", lambda out: out),
        (flash3, "flash_attn_interface", "flash_attn_func", lambda out: (out, None)),
        (xformers, "xformers.ops", "memory_efficient_attention", lambda out: out),
        (sage, "sageattention", "sageattn", lambda out: out),
    ],
)
def test_packages_are_called_in_their_layout(monkeypatch, backend, module, function, answer):
    def theirs(q, k, v, **options):
        assert options in ({}, {"tensor_layout": "NHD", "is_causal": False})
        return answer(exact(q, k, v).to(q.dtype))

    install(monkeypatch, module, function, theirs)
    check(backend.BACKEND.load(), SHAPES[1], torch.float32)
    # Theirs cannot be traced.
    setattr(sys.modules[module], function, torch.compiler.disable(theirs))
    compiled = torch.compile(backend.BACKEND.load(), backend="aot_eager", fullgraph=True, dynamic=True)
    check(compiled, SHAPES[1], torch.float32)


def install(monkeypatch, module, name, function):
    """A package of one function."""
    fake = ModuleType(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, fake)


def test_the_compiler_knows_what_sage_overwrites(monkeypatch):
    def centring(q, k, v, **_):
        k -= k.mean(1, keepdim=True)
        return exact(q, k, v).to(q.dtype)

    install(monkeypatch, "sageattention", "sageattn", centring)
    sage.BACKEND.load()
    whole = torch.ops.flux2_local.sageattention.default
    torch.library.opcheck(whole, draw(SHAPES[1], torch.float32), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("sm", "dtype", "head_dim", "missing"),
    [
        (75, "float16", 128, {"sdpa-cudnn", "sdpa-flash", "flash2", "flash3", "xformers", "sage", "flex"}),
        (80, "bfloat16", 128, {"flash3"}),
        (89, "bfloat16", 128, {"flash3"}),
        (90, "bfloat16", 128, set()),
        (100, "bfloat16", 128, {"flash3", "sage"}),
        (120, "bfloat16", 128, {"flash3"}),
        (90, "float32", 128, {"sdpa-cudnn", "sdpa-flash", "flash2", "flash3", "xformers", "sage"}),
        (90, "bfloat16", 256, {"sdpa-cudnn", "sage"}),
        (90, "bfloat16", 20, set(CUDA) - {"sdpa", "sdpa-math"}),
    ],
)
def test_what_runs_on_which_card(sm, dtype, head_dim, missing):
    assert usable(problem(sm, dtype=dtype, head_dim=head_dim)) == set(CUDA) - missing


def test_reasons_say_what_is_needed_and_what_is_there():
    high = tiers()["high"]
    against = {n: b.reason_against(problem(75, dtype="float16"), high) for n, b in BACKENDS.items()}
    assert against["flash2"] == "it needs compute capability 8.0 for float16, and a card of SM 75 has 7.5"
    assert against["sage"] == "it needs compute capability 8.0 for float16, and a card of SM 75 has 7.5"
    assert "9.0 only" in BACKENDS["flash3"].reason_against(problem(120), high)
    assert "64 or 96 or 128 channels, not 256" in BACKENDS["sage"].reason_against(problem(90, head_dim=256), high)
    assert "in steps of 8" in BACKENDS["flash2"].reason_against(problem(90, head_dim=20), high)
    for tier in ("none", "regular"):
        assert "lossy" in BACKENDS["sage"].reason_against(problem(89), tiers()[tier])
    missing = BACKENDS["sage"].reason_against(problem(89, described=False), high)
    assert missing is not None and "pip install sageattention" in missing


def timed(monkeypatch, seconds, problems=None):
    """Trials with these seconds, in place of a card's."""
    asked = []

    def run(backend, problem):
        asked.append((backend.name, problem.tokens))
        if why := (problems or {}).get(backend.name):
            return trial.Trial(0.0, why)
        return trial.Trial(seconds.get(backend.name, 1.0))

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(attention.backend, "package", lambda name: Package(name, "1.0"))
    return asked


def test_auto_takes_the_fastest_and_records_the_others(monkeypatch):
    asked = timed(monkeypatch, {"sdpa": 1e-3, "flash2": 0.8e-3, "sdpa-cudnn": 0.9e-3}, {"xformers": "it does not run"})
    got = pick("auto", problem(90, described=False), tiers()["regular"])
    assert got.name == "flash2" and "0.80 ms" in got.reason and "4608 tokens" in got.reason
    lost = dict(got.rejected)
    assert set(lost) == set(BACKENDS) - {"flash2"}
    assert lost["sdpa"] == "1.00 ms a call against 0.80" and lost["xformers"] == "it does not run"
    assert "lossy" in lost["sage"] and "compiled" in lost["flex"]
    assert {name for name, _ in asked}.isdisjoint({"sage", "flex", "sdpa-math"})


def test_a_lossy_backend_may_win_in_the_high_tier_only(monkeypatch):
    timed(monkeypatch, {"sage": 1e-4})
    names = {t: pick("auto", problem(89, described=False), tiers()[t]).name for t in ("none", "regular", "high")}
    assert names == {"none": "sdpa", "regular": "sdpa", "high": "sage"}


def test_noise_does_not_decide(monkeypatch):
    timed(monkeypatch, {"sdpa": 1.02e-3, "sdpa-flash": 1.0e-3})
    assert pick("auto", problem(89, described=False), tiers()["regular"]).name == "sdpa"


def test_torchs_own_is_left_where_no_trial_runs(monkeypatch):
    timed(monkeypatch, {}, dict.fromkeys(BACKENDS, "out of memory"))
    got = pick("auto", problem(90, described=False), tiers()["regular"])
    assert got.name == "sdpa" and "no trial" in got.reason and dict(got.rejected)["flash2"] == "out of memory"


def test_one_that_is_named_is_tried_before_anything_is_loaded(monkeypatch):
    asked = timed(monkeypatch, {}, {"flash2": "it does not run here (ImportError: no kernel)"})
    assert pick("sdpa-cudnn", problem(90, described=False), tiers()["regular"]).name == "sdpa-cudnn"
    assert asked == [("sdpa-cudnn", trial.SMALL)]
    with pytest.raises(BackendUnavailableError, match="no kernel.*pip install flash-attn"):
        pick("flash2", problem(90, described=False), tiers()["regular"])


def test_a_trial_refuses_wrong_results(monkeypatch):
    monkeypatch.setattr(trial, "clock", lambda *_: 1e-3)
    p = replace(problem(kind="cpu", dtype="float32", head_dim=16), device="cpu", tokens=33, heads=2)
    assert trial.timed(REFERENCE.attend, p, 0.02) == trial.Trial(1e-3)
    assert "wrong" in trial.timed(lambda q, k, v: v, p, 0.02).problem
    assert "wrong" in trial.timed(lambda q, k, v: v * torch.nan, p, 0.02).problem
    broken = replace(BACKENDS["flash2"], load=lambda: 1 / 0)
    assert "ZeroDivisionError" in trial.run(broken, problem(90)).problem


def test_a_trial_that_ran_out_of_memory_is_made_again():
    asked = []

    def load(error):
        asked.append(error)
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory"), ImportError("no kernel")):
        backend = replace(BACKENDS["flash2"], load=partial(load, error))
        assert all(str(error) in trial.run(backend, problem(90)).problem for _ in range(2))
    assert [type(error) for error in asked] == [torch.OutOfMemoryError, torch.OutOfMemoryError, ImportError]


@pytest.mark.parametrize("name", ["xformers", "sage", "flash2", "flash3", "flex", "sdpa-cudnn"])
def test_one_that_is_named_and_unavailable_is_an_error_at_once(dev_folder, monkeypatch, name):
    monkeypatch.setattr(load, "build", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(BackendUnavailableError, match=f"'{name}' cannot be used .*needs a cuda device") as caught:
        Flux2.load(dev_folder, device="cpu", attention=name)
    assert not BACKENDS[name].get or BACKENDS[name].get in str(caught.value)


def test_a_name_that_is_none(dev_folder):
    with pytest.raises(RequestError, match=r"attention must be one of auto, matmul, sdpa, .*'fast' was given"):
        Flux2.load(dev_folder, attention="fast")


def test_what_is_loaded_is_what_the_plan_says(dev_folder):
    flux = Flux2.load(dev_folder, attention="sdpa-math", device="cpu")
    assert flux.plan.attention == "sdpa-math" and flux._components.transformer.ops.attend is not REFERENCE.attend
    assert "attention: sdpa-math — asked for" in explain(flux.plan)
    assert flux.generate("a boat", image_size="square", num_inference_steps=4, enable_safety_checker=False).images
    assert built(flux.plan) != built(replace(flux.plan, attention="sdpa")) != built(replace(flux.plan, ops="triton"))
    plain = replace(flux.plan, attention="sdpa", ops="reference")
    assert load.operations(plain, flux._components.transformer.config, "cpu") == REFERENCE


@pytest.mark.parametrize(
    ("device", "tier", "ops", "why"),
    [
        ("rtx-4090", "regular", "triton", "passes over memory"),
        ("h200", "high", "triton", "passes over memory"),
        ("h200", "none", "reference", "rounds once"),
        ("cpu-8", "regular", "native", "NVIDIA GPU"),
        ("cpu-8", "none", "native", "NVIDIA GPU"),
        ("apple-m3-max", "regular", "reference", "NVIDIA GPU"),
    ],
)
def test_operations_of_known_devices(device, tier, ops, why):
    plan = make_plan(need(tier=tier), from_preset(device, 2**36))
    choice = next(c for c in plan.choices if c.what == "ops")
    assert plan.ops == choice.value == ops and why in choice.rejected[0][1]
    assert f"ops: {ops} — {choice.reason}" in explain(plan)


def test_triton_that_does_not_run_here_is_not_planned_with(monkeypatch):
    monkeypatch.setattr(constraint, "sm_of", lambda index: 89)
    monkeypatch.setattr(constraint, "problem_on", lambda index: "there is no C compiler")
    here = replace(from_preset("rtx-4090"), device="cuda:0")
    choice = choose_ops(need(), here, "bfloat16")
    assert choice.value == "reference" and dict(choice.rejected)["triton"] == "there is no C compiler"
    assert reason_against(here) == "there is no C compiler"


def test_an_old_card_keeps_plain_torch():
    plan = make_plan(need(), replace(from_preset("rtx-4090"), sm=75))
    assert plan.ops == "reference" and "compute capability 8.0" in explain(plan)


@pytest.mark.parametrize("masked", [False, True])
def test_a_card_that_has_no_kernel_for_bf16_attends_in_float32(masked, monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 96, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 96, 96, dtype=torch.bool).tril() if masked else None
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).bfloat16()
    assert not torch.equal(ops.fused_attention(q, k, v, mask), exact)
    with torch.device("meta"), Workspaces(0, copying=False, widened=True), Peak() as peak:
        ops.fused_attention(*(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)))
    inputs, sums = 3 * q.nbytes, 4 * q[..., 0].numel()
    assert peak.peak == inputs + 4 * 2 * q.nbytes + sums + q.nbytes
    monkeypatch.setattr(ops, "widened", False)
    ops.widen()
    assert torch.equal(ops.fused_attention(q, k, v, mask), exact)


def test_such_a_card_is_planned_with_what_that_takes():
    card = from_preset("laptop-8gb")
    old, new = (
        Draft(Terms(need(), replace(card, sm=sm), "bfloat16", 0, "reference", "sdpa", False, False), None, LAYOUTS[0])
        for sm in (75, 80)
    )
    assert (old.setup.widened, new.setup.widened) == (True, False)
    work, width = need().work, need().arch.transformer.width
    tokens = need().arch.text_tokens + need().arch.tokens(work.width, work.height)
    more = footprint.denoising(old.setup, work) - footprint.denoising(new.setup, work)
    assert 0 < more <= 4 * 4 * tokens * width
    assert make_plan(need(), replace(card, sm=75)).peak_bytes <= card.free


@pytest.mark.parametrize("device", ["rtx-4090", "cpu-8"])
def test_plans_record_every_backend_that_lost(device):
    plan = make_plan(need(), from_preset(device, 2**36))
    choice = next(c for c in plan.choices if c.what == "attention")
    assert choice.value == plan.attention == "sdpa" and {name for name, _ in choice.rejected} == set(BACKENDS) - {
        "sdpa"
    }
    assert all(why for _, why in choice.rejected)


def test_the_command_line_plans_with_it():
    words = ["plan", "-m", "klein-4b", "--device", "rtx-4090", "-a", "high", "--attention"]
    answer = CliRunner().invoke(app, [*words, "sage", "--json"])
    assert json.loads(answer.stdout)["attention"] == "sage"
    refused = CliRunner().invoke(app, [*words, "flash3"]).exception
    assert isinstance(refused, BackendUnavailableError) and "9.0 only" in str(refused)


def test_names_are_unique_and_sdpa_runs_everywhere():
    assert len({b.name for b in BACKENDS.values()}) == len(BACKENDS) == len(sdpa.BACKENDS) + 6
    for p in (problem(50, dtype="float32"), problem(kind="mps", dtype="float16"), problem(kind="cpu", head_dim=7)):
        assert "sdpa" in usable(p, "none")
