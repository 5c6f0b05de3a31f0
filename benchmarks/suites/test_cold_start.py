"""New processes: importing the package, the command's help, and the first picture, each from nothing."""

import subprocess
import sys

import pytest

COMMAND = "import sys; from flux2_local.cli import main; sys.argv[0] = 'flux2-local'; main()"
CASES = {
    "import": ["import flux2_local"],
    "import torch": ["import torch"],
    "help": [COMMAND, "--help"],
    "plan": [COMMAND, "plan", "--model", "tiny"],
}


def start(*arguments):
    subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("case", CASES)
def test_start(case, timed):
    timed(lambda: start(*CASES[case]))


def test_first_picture(timed, tmp_path, device):
    where = ["--device", str(device), "-o", str(tmp_path / "picture.png")]
    timed(lambda: start(COMMAND, "a lighthouse at dusk", "--model", "tiny", "--variant", "flash", *where))
