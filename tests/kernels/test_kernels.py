"""Kernels where there is no GPU: run by Triton's interpreter, which has to be asked for before Triton is imported and
then stays, and compiled for a Hopper GPU: so all files of each in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "how, which", [("interpreted", "not endurance"), ("compiled", "not endurance"), pytest.param("compiled", "endurance", marks=pytest.mark.endurance)]
)  # fmt: skip
def test_kernels_compute_what_their_definitions_say_and_compile_without_a_gpu(how, which):
    files = sorted(map(str, HERE.glob(f"{how}_*.py")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {"TRITON_INTERPRET": "1"} if how == "interpreted" else {}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", which, "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert len(files) > 1 and done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
