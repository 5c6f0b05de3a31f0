"""The public namespace, and that importing it costs nothing."""

import subprocess
import sys
import time

import flux2_local

HEAVY = ("torch", "numpy", "diffusers", "transformers", "pydantic", "PIL", "huggingface_hub", "rich")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_resolves_and_is_documented():
    for name in flux2_local.__all__:
        value = getattr(flux2_local, name)
        assert name.startswith("__") or value.__doc__, name
    assert sorted(flux2_local.__all__) == flux2_local.__all__
    assert set(flux2_local._HOME) | {"__version__"} == set(flux2_local.__all__)


def test_every_error_is_public_and_in_one_tree():
    from flux2_local import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert all(issubclass(kind, flux2_local.Flux2Error) for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(flux2_local.__all__)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_importing_imports_nothing_heavy():
    loaded = run_python(f"import flux2_local, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_help_imports_no_torch_and_answers_quickly():
    code = "import sys; sys.argv=['flux2-local','--help']\ntry:\n from flux2_local.cli import main; main()\nexcept SystemExit: pass\n"
    loaded = run_python(
        code + "print('torch' in sys.modules, 'diffusers' in sys.modules, 'pydantic_core' in sys.modules)"
    )
    assert loaded.strip().endswith("False False False") or loaded.strip().endswith("False False True")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run_python(code)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5, "half a second on an idle machine; this bound allows for a busy one"


def test_generating_imports_neither_diffusers_nor_transformers_nor_twice_the_compiler():
    """A cold process should spend its time on the picture. What the plan counts on the meta device, for which torch imports its
    compiler, is kept from the first time on."""
    heavy = ("diffusers", "transformers", "torchao", "peft")
    code = (
        "import sys\nfrom flux2_local import Flux2\n"
        "Flux2.load('tiny','flash').generate('a ball',image_size='square')\n"
        f"print([m for m in {(*heavy, 'torch._dynamo')} if m in sys.modules])"
    )
    assert run_python(code).strip() in ("[]", "['torch._dynamo']")
    assert run_python(code).strip() == "[]"
