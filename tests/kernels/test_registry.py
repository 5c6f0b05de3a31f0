"""Which implementation is chosen where, and why another is not: without a card, from the description of a place."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from flux2_kernels import OPS, Format, KernelUnavailable, Op, Place, choose, constraint, place_of, reasons
from flux2_kernels.bench.tuning import Tuner, groups
from flux2_kernels.constraint import FLOATS, FP8
from flux2_kernels.gpu import int_mm
from flux2_kernels.shapes import MODELS
from flux2_kernels.tables import config_of, imposed, kept_sms, nearest, order_of, table
from flux2_kernels.verify import draw

INT8 = Format(torch.bfloat16, torch.int8)
E4M3 = Format(torch.bfloat16, FP8)
SMS = (80, 86, 89, 90, 100, 120)


def card(sm: int) -> Place:
    return Place("cuda", sm, triton=True)


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, flux2_kernels; assert not [m for m in sys.modules if m.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from flux2_kernels import OPS, Place, choose
for sm in (0, 75, 80, 86, 89, 90, 100, 120):
    for op in OPS.values():
        for form in op.formats:
            for case in (*op.cases, *op.shapes):
                choice = choose(op.name, Place("cuda" if sm else "cpu", sm), form, case.dims)
                assert callable(choice.function)
                if choice.implementation != "reference":
                    print(sm, op.name, choice.implementation, form)
"""


def test_triton_that_launches_nothing_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C compiler, which its first launch calls. Where memory ran out it is tried again."""
    tried = []

    def launch_one(index: int) -> None:
        tried.append(index)
        raise (torch.OutOfMemoryError("CUDA out of memory") if index else RuntimeError("Failed to find C compiler.\n"))

    monkeypatch.setattr(constraint, "launch_one", launch_one)
    monkeypatch.setattr(constraint, "sm_of", lambda index: 86)
    constraint._problem_on.cache_clear()
    why = "Triton is installed and does not run here (RuntimeError: Failed to find C compiler.)"
    for _ in range(2):
        assert place_of("cuda:0") == Place("cuda", 86, triton=False, problem=why)
        assert place_of("cuda:1") == card(86)
    assert tried == [0, 1, 1] and reasons("swiglu", place_of("cuda:0"), Format(torch.bfloat16))["triton"] == why
    constraint._problem_on.cache_clear()


def test_what_is_chosen_without_triton_can_be_imported() -> None:
    """torch brings Triton not everywhere. The products of 8-bit rows need none: torch's library has them."""
    path = {"PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=path)
    assert ran.returncode == 0, ran.stderr
    found = {tuple(line.split()) for line in ran.stdout.splitlines()}
    want = {(str(sm), "linear_w8a8", "scaled_mm", str(E4M3)) for sm in SMS if sm >= 89}
    names = [str(Format(dtype, torch.int8)) for dtype in FLOATS]
    assert found == want | {(str(sm), "linear_w8a8", "int_mm_alone", name) for sm in SMS for name in names}


def test_the_int8_library_alone_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts that rows come in, the last of which is short."""
    monkeypatch.setattr(int_mm, "PART", 20)
    op, form = OPS["linear_w8a8"], Format(torch.bfloat16, torch.int8)
    for case in op.cases:
        inputs = draw(op, case, form, torch.device("cpu"), 0)
        got = op.implementation("int_mm_alone").load()(**inputs)
        assert torch.equal(got, op.reference(**inputs)), case


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_reference_runs_everywhere_and_comes_last(op: Op) -> None:
    assert op.implementations[-1].name == "reference"
    for form in op.formats:
        assert reasons(op.name, Place("cpu"), form)["reference"] is None
        assert choose(op.name, "cpu", form).function is op.reference


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_model_shape_has_a_kernel_on_every_sm(op: Op) -> None:
    """In half precision, at the sizes that the models call; fp8 from SM 89 on."""
    for sm in SMS:
        for form in op.formats:
            for case in op.shapes:
                refused = reasons(op.name, card(sm), form, case.dims)["triton"]
                if form.quantized == FP8 and sm < 89:
                    assert refused == f"it needs compute capability 8.9 and the device has {sm / 10:.1f}"
                else:
                    assert refused is None


@pytest.mark.parametrize(
    ("name", "place", "form", "dims", "reason"),
    [
        ("swiglu", Place("cpu", triton=True), Format(torch.bfloat16), {}, "it needs an NVIDIA GPU"),
        ("swiglu", Place("mps"), Format(torch.bfloat16), {}, "Triton is not installed"),
        ("swiglu", card(75), Format(torch.bfloat16), {}, "compute capability 8.0"),
        ("swiglu", card(90), Format(torch.float64), {}, "float64 is not among its dtypes"),
        ("modulated_norm", card(90), Format(torch.bfloat16), {"width": 20000}, "width must be at most 16384"),
        ("qk_norm_rope", card(90), Format(torch.bfloat16), {"head_dim": 96}, "power of two from 16 to 256"),
        ("quantize_rows", card(90), INT8, {"hadamard": 48}, "hadamard must be one of"),
        ("quantize_rows", card(90), INT8, {"hadamard": 128, "width": 100}, "multiple of hadamard"),
        ("quantize_rows", card(86), E4M3, {}, "compute capability 8.9"),
        ("linear_w8a8", card(90), INT8, {"k": 100}, "k must be a multiple of 16"),
        (
            "linear_w4a16",
            card(90),
            Format(torch.bfloat16),
            {"group": 128, "k": 128, "n": 40},
            "n must be a multiple of 16",
        ),
        ("linear_w4a16", card(90), Format(torch.bfloat16), {"group": 32}, "group must be one of 64, 128"),
        ("linear_w4a16", card(90), Format(torch.bfloat16), {"group": 128, "k": 192}, "k must be a multiple of group"),
    ],
)
def test_an_implementation_that_cannot_run_says_why(
    name: str, place: Place, form: Format, dims: dict[str, int], reason: str
) -> None:
    why = reasons(name, place, form, dims)["triton"]
    assert why is not None and reason in why
    with pytest.raises(KernelUnavailable, match="implementation 'triton' of") as caught:
        choose(name, place, form, dims, "triton")
    assert reason in str(caught.value) and "reference" in str(caught.value)


def test_auto_takes_the_next_and_keeps_the_reason() -> None:
    choice = choose("modulated_norm", card(75), torch.float16)
    assert choice.implementation == "reference"
    assert choice.rejected == {"triton": "it needs compute capability 8.0 and the device has 7.5"}
    assert (
        choose("modulated_norm", Place("cpu"), torch.float32).rejected["triton"].startswith("Triton is not installed")
    )


def test_a_format_that_nothing_takes_is_an_error() -> None:
    with pytest.raises(KernelUnavailable, match="no implementation of linear_w4a16 can run here"):
        choose("linear_w4a16", "cpu", torch.float64)


def test_unknown_names_are_named() -> None:
    with pytest.raises(KeyError, match="modulated_norm"):
        choose("layer_norm", "cpu", torch.float32)
    with pytest.raises(KeyError, match="triton, reference"):
        choose("swiglu", "cpu", torch.float32, implementation="cuda")


def test_the_library_comes_first_where_the_table_says_so() -> None:
    defaults = [i.name for i in OPS["linear_w8a8"].implementations]
    for sm in SMS:
        kept = table(sm)["order"]["linear_w8a8"]
        assert order_of(sm, "linear_w8a8", INT8, defaults)[: len(kept["int8"])] == kept["int8"]
    assert next(iter(reasons("linear_w8a8", card(90), E4M3))) == table(90)["order"]["linear_w8a8"]["float8_e4m3fn"][0]
    assert order_of(0, "linear_w8a8", INT8, defaults) == defaults


def test_the_int8_library_gets_rows_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card it refuses fewer than 17, and a language model that writes has one."""
    library = torch._int_mm

    def refusing(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] > 16
        return library(x, w)

    monkeypatch.setattr(torch, "_int_mm", refusing)
    for tokens in (1, 16, 17):
        x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((1, tokens, 32), (48, 32)))
        assert torch.equal(int_mm.sums(x, w), (x[0].int() @ w.int().T))


def test_a_library_that_fails_is_left_out_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: Tuner, problems: object, implementation: str) -> float:
        if implementation == "int_mm":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return 1.0

    monkeypatch.setattr(Tuner, "seconds", seconds)
    said: list[str] = []
    tuner = Tuner(card(90), torch.device("cpu"), lambda op, case: case, progress=said.append)
    assert tuner.order("linear_w8a8")["int8"] == ["triton", "int_mm_alone"]
    assert "linear_w8a8 bfloat16+int8 int_mm: RuntimeError" in said


def test_place_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert place_of("cpu").device == "cpu" and not place_of("cpu").interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert place_of("cpu").interpreter


def test_tables() -> None:
    assert set(SMS) <= set(kept_sms())
    assert [nearest(sm) for sm in (75, 80, 87, 89, 103, 121)] == [80, 80, 86, 89, 100, 120]
    for sm in SMS:
        assert table(sm)["sm"] == sm
        kernels = set(table(80)["configs"]) | ({"linear_w8a8_fp8"} if sm >= 89 else set())
        assert set(table(sm)["configs"]) == kernels
        for entries in table(sm)["configs"].values():
            assert "equal" not in entries[-1] and "at_most" not in entries[-1], "the last entry serves every problem"


def test_the_first_entry_that_fits_is_taken() -> None:
    entries = table(80)["configs"]["modulated_norm"]
    assert config_of(80, "modulated_norm", width=entries[0]["at_most"]["width"])["num_warps"] == entries[0]["num_warps"]
    assert config_of(80, "modulated_norm", width=16384)["num_warps"] == entries[-1]["num_warps"]
    with imposed("modulated_norm", {"num_warps": 2}):
        assert config_of(80, "modulated_norm", width=16384) == {"num_warps": 2}
    assert config_of(80, "modulated_norm", width=16384)["num_warps"] == entries[-1]["num_warps"]


@pytest.mark.parametrize("kernel", ["modulated_norm", "gated_residual_norm", "quantize_rows"])
def test_rows_in_registers_are_tuned_in_float32_too(kernel: str) -> None:
    """Which takes twice as many: the entry is for the widest row, that none spills."""
    first, *rest = groups(kernel)
    assert first.condition == {"equal": {"size": 4}} and not any("equal" in group.condition for group in rest)
    assert {form.dtype for _, form, _ in first.problems} == {torch.float32}
    widest = rest[-1].problems[0][2]
    assert [case for *_, case in first.problems] == [widest] * len(first.problems)


def test_costs_by_hand() -> None:
    """dev at 1024 × 1024: bytes and operations of one norm and one matmul."""
    dims = {"batch": 1, "tokens": 4608, "width": 6144}
    norm = OPS["modulated_norm"].cost(dims, Format(torch.bfloat16))
    assert norm.bytes == 2 * (2 * 4608 * 6144 + 2 * 6144) and norm.matmul is None
    linear = OPS["linear_w8a8"].cost({"batch": 1, "tokens": 4608, "n": 55296, "k": 6144}, E4M3)
    assert linear.flops == 2 * 4608 * 55296 * 6144 and linear.matmul == FP8
    assert linear.bytes == (4608 + 55296) * 6144 + 4 * (4608 + 55296) + 2 * 4608 * 55296


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_costs_count_the_tensors_of_a_case(op: Op) -> None:
    """Bytes by the formula against the sizes of real inputs and outputs, one batch and dense."""
    case, form = op.cases[0], op.formats[0]
    inputs = op.inputs(case, form, torch.device("cpu"), torch.Generator().manual_seed(0))
    outputs = op.reference(**inputs)
    tensors = [
        x for x in (*inputs.values(), *([outputs] if torch.is_tensor(outputs) else outputs)) if torch.is_tensor(x)
    ]
    assert op.cost(case.dims, form).bytes == sum(x.numel() * x.element_size() for x in tensors)


def test_model_shapes() -> None:
    assert MODELS["dev"].linears["single-in"] == (55296, 6144)
    assert MODELS["dev"].linears["single-out"] == (6144, 24576)
