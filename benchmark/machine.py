"""The machine and the checkout that a run belongs to."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """What all rows of one run share. One run is one machine."""

    date: str  # its start: UTC, ISO 8601, to the second
    commit: str
    gpu: str  # on a machine without one, the CPU
    driver: str
    torch: str
    cutlass_dsl: str


def start_run(device: str, commit: str | None = None) -> Run:
    """The facts of this machine and checkout; `commit` is for a checkout without its `.git`."""
    return Run(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit or _commit(),
        gpu=_cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        driver="" if device == "cpu" else _smi("driver_version"),
        torch=torch.__version__,
        cutlass_dsl=_version("nvidia-cutlass-dsl"),
    )


def describe(run: Run, absent: Mapping[str, str]) -> str:
    """The header of a run; `absent` gives the reason for each implementation that is not here."""
    limits = _smi("power.limit,clocks.max.sm") if run.driver else ""
    versions = {
        "driver": run.driver,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "PyTorch": run.torch,
        "nvidia-cutlass-dsl": run.cutlass_dsl,
        "flash-attn": _version("flash-attn"),
        "flash-attn-4": _version("flash-attn-4"),
    }
    lines = [
        f"mini-flash-attention, commit {run.commit}, {run.date}",
        ", ".join(filter(None, [run.gpu, limits, platform.platform()])),
        ", ".join(f"{name} {value or 'none'}" for name, value in versions.items()),
    ]
    return "\n".join(lines + [f"absent: {name} ({reason})" for name, reason in absent.items()])


def _version(distribution: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _smi(query: str) -> str:
    """Facts that nvidia-smi knows of the first GPU, or an empty string."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
    return _output(command)


def _commit() -> str:
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changed = _output(["git", "status", "--porcelain", "--", "mini_flash_attention"])
    return f"{commit}-dirty" if changed else commit


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name} ({torch.get_num_threads()} threads)"
