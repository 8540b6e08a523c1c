"""`python -m mini_flash_attention precompile` fills the cache; `... env` is for bug reports."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

import torch

import mini_flash_attention
from mini_flash_attention.gpu import cache, compile, config, wheel


def main() -> None:
    """Runs the command that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m mini_flash_attention")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "precompile",
        help="compile kernels ahead of time, for any GPU, without a GPU",
        description="Compiles kernels into the cache, for every path that runs on these architectures: "
        "forward (dense, variable lengths, pages), backward, decoding and the append to a cache. Without "
        "options: head dims 64 and 128, both dtypes, full and causal. Score functions, sinks, dropout "
        "and deterministic gradients are compiled at first use.",
    )
    command.set_defaults(run=precompile)
    command.add_argument("--arch", nargs="+", help="such as sm_90a; by default the GPU here")
    command.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], metavar="D")
    command.add_argument("--dtype", nargs="+", choices=config.DTYPES, default=config.DTYPES)
    command.add_argument("--mask", nargs="+", choices=config.MASKS, default=["full", "causal"])
    command.add_argument("--all", action="store_true", help="every kernel, whatever else is given")
    command.add_argument(
        "--wheel", type=Path, metavar="DIR", help="make a wheel of them, to install beside the package"
    )
    command.add_argument("--jobs", type=int, metavar="N", help="processes; default: one per core")

    command = commands.add_parser("env", help="print versions, GPUs and the state of the cache")
    command.set_defaults(run=show_environment)

    arguments = parser.parse_args()
    arguments.run(arguments)


def precompile(arguments: argparse.Namespace) -> None:
    """Compiles what the command line asks for and the cache lacks."""
    if not arguments.arch and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: say which, for example --arch sm_90a")
    try:
        archs = arguments.arch or [config.gpu_arch(torch.cuda.get_device_capability())]
        for arch in archs:
            _check_arch(arch)
        configs = [c for arch in archs for c in config.configs(arch)]
        if not arguments.all:
            configs = _chosen(configs, arguments)
        compiled = compile.precompile(configs, arguments.jobs)
        where = cache.directory() if wheel.installed(compile.made_for()) is None else "the cache or the wheel"
        print(f"{compiled} kernels compiled, {len(configs) - compiled} were in {where}")
        if arguments.wheel:
            entries = {compile.library(row) for row in configs}
            print(f"{len(entries)} kernels in {wheel.write(arguments.wheel, entries, compile.made_for())}")
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error


def _check_arch(arch: str) -> None:
    """ValueError: there are no kernels for it. It names the one that was meant, if one was."""
    if arch in config.SHARED_MEMORY:
        return
    digits = re.sub(r"\D", "", arch)
    meant = [known for known in config.SHARED_MEMORY if re.sub(r"\D", "", known) == digits]
    hint = f": did you mean {meant[0]}?" if meant else ""
    raise ValueError(f"--arch is one of {', '.join(config.SHARED_MEMORY)}, not {arch}{hint}")


def _chosen(configs: list[config.Config], arguments: argparse.Namespace) -> list[config.Config]:
    """Those of the asked-for kinds; a kernel for all head dims or masks is of each kind."""
    largest = config.HEAD_DIMS[-1]
    for head_dim in arguments.head_dim:
        if not 1 <= head_dim <= largest:
            raise ValueError(f"--head-dim is from 1 to {largest}, not {head_dim}")
    head_dims = {config.bucket(d) for d in arguments.head_dim}
    return [
        c
        for c in configs
        if getattr(c, "head_dim", None) in (None, *head_dims)
        and c.dtype in arguments.dtype
        and getattr(c, "mask", None) in (None, *arguments.mask)
    ]


def show_environment(_: argparse.Namespace) -> None:
    """Prints what a bug report should contain."""
    _show("mini-flash-attention", mini_flash_attention.__version__)
    _show("Python", f"{platform.python_version()}, {platform.platform()}")
    _show("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "apache-tvm-ffi-orcjit", "flash-attn"):
        _show(package, _version(package))
    _show("driver", _driver())
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        _show(f"GPU {i}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}")
    _show("backend", os.environ.get("MINI_FLASH_ATTENTION_BACKEND", "chosen by the device"))
    _show("linker", shutil.which("ld") or shutil.which("cc") or "none")
    _show("cache", _cache())
    _show("wheel of kernels", _wheel())


def _cache() -> str:
    try:
        sizes = [path.stat().st_size for path in cache.entries()]
        return f"{cache.directory()}: {len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB"
    except OSError as error:
        return f"cannot be used: {error}"


def _wheel() -> str:
    try:
        folder = wheel.installed(compile.made_for())
    except ImportError as error:
        return f"cannot be used: {error}"
    return "none that fits" if folder is None else f"{folder}: {len(cache.entries_in(folder))} kernels"


def _show(name: str, value: str) -> None:
    print(f"{name:<22}{value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    cuda = compile.driver_cuda_version()
    if cuda is None:
        return "none"
    version = Path("/sys/module/nvidia/version")
    number = version.read_text().strip() if version.exists() else "of an unknown version"
    return f"{number}, up to CUDA {cuda[0]}.{cuda[1]}"


if __name__ == "__main__":
    main()
