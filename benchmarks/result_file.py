"""What every benchmark writes: a file that is whole at any moment, on which machine and of which commit, and what is missing."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.subjects import Case, LeftOutError
from benchmarks.tables import ROOT


class Budget:
    """Wall seconds for the whole program, shared out among the cases still to come. None: no end."""

    def __init__(self, seconds: float | None):
        self.ends_s = float("inf") if seconds is None else time.perf_counter() + seconds

    def is_over(self) -> bool:
        return time.perf_counter() >= self.ends_s

    def deadline_s(self, cases: int) -> float:
        """When a case should stop that has `cases` - 1 behind it; on the clock of `time.perf_counter`."""
        now = time.perf_counter()
        return now + max(0.0, self.ends_s - now) / cases


class ResultFile:
    """The result as it grows; `path` holds all of it after each `write`, even if the program is killed in one."""

    def __init__(self, path: Path | None, head: dict):
        self.path = path
        self.data = head | {"phases": [], "rows": [], "left_out": {}}

    @property
    def failed(self) -> bool:
        return any(reason.startswith("failed: ") for reason in self.data["left_out"].values())

    def leave_out(self, subjects: list[str], case: Case | None, reason: str) -> None:
        self.data["left_out"][", ".join(subjects) + (f": {case}" if case else "")] = reason

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
            os.replace(unfinished, self.path)


def reason_of(error: Exception) -> str:
    """For the file. An error that is not a reason by itself is shown in full, and makes the program fail at its end."""
    if isinstance(error, LeftOutError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    traceback.clear_frames(error.__traceback__)  # they hold the GPU memory that the next subject needs
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + lines[0] if lines else ''}"


def environment(device: torch.device, commit: str | None) -> dict:
    """The machine and the versions: what a figure means nothing without."""
    versions = {"torch": torch.__version__}
    for package in ("diffusers", "transformers", "triton", "torchao", "cache-dit"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        **versions,
        "python": platform.python_version(),
        "commit": commit or subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"
