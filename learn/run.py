"""Climb the ladder: check each step against the formula, time it, show what it gained.

  python learn/run.py                     all steps: checked, timed, as a table with bars
  python learn/run.py --step 8            one step
  python learn/run.py --diff 7 8          what changed between two, in colour
  python learn/run.py --compile sm_90a    compile all steps for a GPU that need not be here
  python learn/run.py --texts             fill what was recorded into the pages
  python learn/run.py --record COMMIT     as without arguments, on a GPU; appends rows to results.csv

Without a GPU the PyTorch steps run on the CPU, the others are compiled, and recorded numbers are shown as
recorded. Compiled steps are kept in learn/build: a machine that has them there needs CuTe DSL's runtime, not
its compiler.
"""

import argparse
import csv
import ctypes
import datetime
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
BUILD, RESULTS = HERE / "build", HERE / "results.csv"
D, SYMBOL = 128, "attention"
FIELDS = "date,commit,gpu,torch,cutlass_dsl,step,causal,batch,seqlen,heads,ms,spread,tflops,shapes_right"
COMPARED = {
    "sdpa": "PyTorch's attention",
    "sdpa causal": "PyTorch's attention, causal",
    "beside": "the package",  # --beside
    "beside causal": "the package, causal",
    "matmul": "a matrix product of 8192³",
}
TIMED = ((1, 16384, 16), (4, 4096, 16))  # batch, seqlen, heads: of the table, and for the record

# batch, queries, keys, heads, growth: how much larger the first keys are than the last, or (negative) the
# reverse. The causal step takes those with no more queries than keys.
SHAPES = [
    *((1, 128 * i, 128 * j, 1, 0) for i, j in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 5), (3, 3), (3, 7))),
    *((b, s, s, h, 0) for b, s, h in ((1, 512, 3), (2, 640, 2), (3, 384, 5), (2, 1024, 4), (1, 2048, 7))),
    *((2, 128 * i, 128 * j, 2, 0) for i, j in ((1, 16), (4, 9), (5, 8), (8, 12), (9, 1), (7, 2))),
    *((1, s, s, 2, growth) for s in (256, 896, 1536) for growth in (20, -20)),
    *((1, 256, 1024, 3, growth) for growth in (3, 60)),
]


class Step(NamedTuple):
    path: Path
    number: int
    arch: str | None  # that it is written for; None: PyTorch
    causal: bool

    @property
    def key(self) -> str:
        """Its name in results.csv, which outlives its number."""
        return self.path.stem[3:]

    @property
    def name(self) -> str:
        return self.key.replace("_", " ")


def steps() -> list[Step]:
    """All steps, without importing them: the CuTe ones need the compiler for that."""
    found = []
    for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
        arch = re.search(r'^ARCH = "(\w+)"', path.read_text(), re.M)
        found.append(Step(path, int(path.stem[:2]), arch and arch[1], "causal" in path.stem))
    return found


def runs_on(step: Step, gpu: str | None) -> bool:
    return step.arch is None or gpu is not None and (step.arch == "sm_80" or step.arch == gpu)


def gpu_arch() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


# Compiling


def built(step: Step, arch: str) -> Path:
    """Where the step's library lies once it is compiled; the name holds a hash of what it is made of."""
    versions = [importlib.metadata.version(p) for p in ("nvidia-cutlass-dsl", "apache-tvm-ffi")]
    parts = step.path.read_bytes(), (HERE / "helpers.py").read_bytes(), repr(versions).encode()
    return BUILD / f"{step.path.stem}-{arch}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"


def arguments(step: Step) -> list:
    """Stand-ins for what launch takes, without the stream: what compilation may know of them."""
    import cutlass.cute as cute
    from cutlass import BFloat16, Int32
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_tensor

    def fake(*shape) -> cute.Tensor:  # 16-byte aligned, any strides but a unit last one
        strides = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
        return make_fake_tensor(BFloat16, (*shape, D), stride=strides, assumed_align=16)

    b, sq, sk, h = (cute.sym_int() for _ in range(4))
    tensors = [fake(b, sq, h), fake(b, sk, h), fake(b, sk, h), fake(b, sq, h)]
    return tensors + ([make_fake_compact_tensor(Int32, (2,)), Int32(1)] if persistent(step) else [])


def imported(step: Step):
    """The step's module; the compiler is needed for all but the PyTorch ones."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return importlib.import_module(step.path.stem)


def compile_step(step: Step, arch: str) -> None:
    """Compile, export, link; beside the library, its resources as JSON."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream

    module = imported(step)
    # ptxas treats kernels otherwise whose names hold "cutlass": step 3 would get 32 registers and a stack
    module.kernel.set_name_prefix(f"learn_{step.number:02}", remove_cutlass_symbol=True)
    stream, options = make_fake_stream(use_tvm_ffi_env_stream=True), f"--enable-tvm-ffi --gpu-arch {arch}"
    compiled = cute.compile(module.launch, *arguments(step), stream, options=options)
    BUILD.mkdir(exist_ok=True)
    path = built(step, arch)
    temporary = path.with_suffix(f".{os.getpid()}.o")
    compiled.export_to_c(str(temporary), SYMBOL)
    registers, stack = resources(temporary.read_bytes())
    found = {"registers": registers, "stack": stack, "shared_memory": module.SHARED_MEMORY}
    path.with_suffix(".json").write_text(json.dumps(found))
    command = ["ld", "-shared", "-o", temporary.with_suffix(".so"), temporary]
    if shutil.which("ld") and subprocess.run(command).returncode == 0:
        os.replace(temporary.with_suffix(".so"), path)
        temporary.unlink()
    else:  # no linker: the compiler loads the object file
        os.replace(temporary, path.with_suffix(".o"))


def persistent(step: Step) -> bool:
    """Whether launch takes a counter, two int32 zeros that it leaves zero, and the number of SMs."""
    return "counter: cute.Tensor" in step.path.read_text()


def resources(content: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of stack, of the one kernel in an object file."""
    at = content.find(b"\x7fELF", 1)  # the GPU code in it is an ELF file, too
    while struct.unpack_from("<H", content, at + 18)[0] != 190:  # EM_CUDA
        at = content.find(b"\x7fELF", at + 1)
    elf = content[at:]
    (table,), (size, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    (info,) = (h for h in headers if elf[headers[names][4] + h[0] :].startswith(b".nv.info\0"))
    registers = stack = 0
    at, end = info[4], info[4] + info[5]
    while at < end:  # records: format, attribute, size; then a symbol and a value
        form, attribute, length = struct.unpack_from("<BBH", elf, at)
        if form == 4 and attribute == 0x2F:  # EIATTR_REGCOUNT
            registers = max(registers, struct.unpack_from("<I", elf, at + 8)[0])
        if form == 4 and attribute in (0x11, 0x12):  # EIATTR_FRAME_SIZE, EIATTR_MIN_STACK_SIZE
            stack = max(stack, struct.unpack_from("<I", elf, at + 8)[0])
        at += 4 + (length if form == 4 else 0)
    return registers, stack


def compile_all(wanted: list[tuple[Step, str]]) -> None:
    """Compile what is not there, in parallel processes."""
    missing = [(step, arch) for step, arch in wanted if not find(step, arch)]
    if not missing:
        return
    if importlib.util.find_spec("cutlass") is None:
        raise ImportError("CuTe DSL is not here: pip install 'nvidia-cutlass-dsl[cu13]' apache-tvm-ffi")
    jobs = min(len(os.sched_getaffinity(0)), len(missing))
    start = time.time()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_step, step, arch): step for step, arch in missing}
        for future in as_completed(futures):
            future.result()
    print(f"compiled {len(missing)} steps in {time.time() - start:.0f} s, into {BUILD}", flush=True)


def find(step: Step, arch: str) -> Path | None:
    path = built(step, arch)
    return next((p for p in (path, path.with_suffix(".o")) if p.exists()), None)


# Running


def load(step: Step, arch: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The step as a function of q, k and v."""
    if step.arch is None:
        return imported(step).attention
    import tvm_ffi

    path = find(step, arch)
    folders = importlib.util.find_spec("nvidia_cutlass_dsl").submodule_search_locations
    runtimes = [p for f in folders for p in Path(f).glob("cu[0-9]*/lib/libcute_dsl_runtime.so")]
    cuda = f"cu{torch.version.cuda.split('.')[0]}"
    runtimes.sort(key=lambda p: p.parts[-3] == cuda)
    ctypes.CDLL(str(runtimes[-1]), mode=ctypes.RTLD_GLOBAL)  # what every compiled step calls
    if path.suffix == ".o":
        from cutlass.cute import runtime

        launch = runtime.load_module(str(path), enable_tvm_ffi=True)[SYMBOL]
    else:
        launch = tvm_ffi.load_module(path)[SYMBOL]
    more = ()
    if persistent(step):
        num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        more = torch.zeros(2, dtype=torch.int32, device="cuda"), num_sms

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        launch(q, k, v, out, *more)
        return out

    return attention


def inputs(batch: int, sq: int, sk: int, heads: int, growth: float, device: str) -> list[Tensor]:
    """q, k, v; growth: see SHAPES."""
    q, k, v = (torch.randn(batch, s, heads, D, device=device) for s in (sq, sk, sk))
    if growth:
        factors = torch.linspace(abs(growth), 1, sk, device=device)
        k *= (factors if growth > 0 else factors.flip(0))[:, None, None]
    return [x.bfloat16() for x in (q, k, v)]


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """The formula in a dtype; causal: query i sees the keys up to i + (keys - queries)."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    S = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        seen = S.shape[-1] - S.shape[-2]
        hidden = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(seen + 1)
        S = S.masked_fill(hidden, float("-inf"))
    return (torch.softmax(S, dim=-1) @ v).transpose(1, 2)


def is_right(out: Tensor, ref: Tensor, low: Tensor) -> bool:
    """The error rule: out may be wrong by twice as much as the formula in bfloat16, and a rounding."""
    rounded = ref.to(out.dtype)
    rounding = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    error, low_error = (out.float() - ref).abs(), (low.float() - ref).abs()
    largest = error.max() <= 2 * low_error.max() + rounding  # False if out has a NaN
    return bool(largest and error.mean() <= 2 * low_error.mean() + rounding / 10)


def count_right(ladder: list[Step], functions: dict, device: str, shapes: list) -> dict[str, str]:
    """For each step "right / checked", of these shapes."""
    right, checked = ({step.key: 0 for step in ladder} for _ in range(2))
    torch.manual_seed(0)
    for shape in shapes:
        q, k, v = inputs(*shape, device)
        for causal in {step.causal for step in ladder}:
            if causal and shape[1] > shape[2]:
                continue
            ref, low = (formula(q, k, v, causal, dtype) for dtype in (torch.float32, torch.bfloat16))
            for step in ladder:
                if step.causal == causal:
                    checked[step.key] += 1
                    right[step.key] += is_right(functions[step.key](q, k, v), ref, low)
    return {n: f"{right[n]} / {checked[n]}" for n in right}


def flops(batch: int, seqlen: int, heads: int, causal: bool) -> float:
    return 4 * batch * heads * seqlen**2 * D / (2 if causal else 1)


def times(functions: dict[str, Callable], rounds: int = 12, turn: float = 25) -> dict[str, list[float]]:
    """Milliseconds of each function, in random turns of about `turn` milliseconds, on the GPU."""

    def measure(function: Callable, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    first = {}
    for name, function in functions.items():
        function()
        first[name] = measure(function, 1)
    found = {name: [] for name in functions}
    for i in range(rounds):
        names = [name for name in functions if i < 2 or first[name] < 200]
        for name in random.sample(names, len(names)):
            calls = max(1, round(turn / first[name]))
            for _ in range(calls if first[name] < 200 else 0):
                functions[name]()  # the clock that this function's power allows, not the one's before it
            found[name].append(measure(functions[name], calls))
    return found


def timed(ladder: list[Step], functions: dict, size: tuple[int, int, int], beside: str | None) -> dict:
    """Times of all steps and of what they are compared with: name -> (causal, milliseconds)."""
    batch, seqlen, heads = size
    q, k, v = inputs(batch, seqlen, seqlen, heads, 0, "cuda")
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    todo = {s.key: (s.causal, lambda f=functions[s.key]: f(q, k, v)) for s in ladder}
    todo["matmul"] = False, lambda: a @ a
    other = None
    if beside:
        module, name = beside.split(":")
        other = getattr(importlib.import_module(module), name)
    for causal in sorted({step.causal for step in ladder}):
        label = " causal" if causal else ""
        todo["sdpa" + label] = causal, lambda c=causal: sdpa(*heads_first, is_causal=c)
        if other:
            todo["beside" + label] = causal, lambda c=causal: other(q, k, v, causal=c)
    found = times({name: function for name, (_, function) in todo.items()})
    return {name: (todo[name][0], ms) for name, ms in found.items()}


def rows(found: dict, size: tuple[int, int, int], right: dict[str, str], commit: str) -> Iterator[dict]:
    """Rows of results.csv."""
    batch, seqlen, heads = size
    for name, (causal, ms) in found.items():
        median = statistics.median(ms)
        work = 2 * 8192**3 if name == "matmul" else flops(*size, causal)
        deciles = statistics.quantiles(ms, n=10)
        yield {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": commit,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cutlass_dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
            "step": name,
            "causal": int(causal),
            "batch": batch,
            "seqlen": seqlen,
            "heads": heads,
            "ms": f"{median:.4f}",
            "spread": f"{(deciles[-1] - deciles[0]) / median:.3f}",
            "tflops": f"{work / median / 1e9:.1f}",
            "shapes_right": right.get(name, ""),
        }


# Showing


def show(table: list[dict], title: str, seqlen: int) -> None:
    """The ladder: rows of results.csv, with bars."""
    table = [row for row in table if int(row["seqlen"]) == seqlen]
    speed = {row["step"]: float(row["tflops"]) for row in table}
    names = {step.key: f"{step.number:2} {step.name}" for step in steps()}
    print(f"\n{title}; {seqlen} tokens, 16 heads of 128, bfloat16\n")
    print(f"{'step':32}{'TFLOP/s':>8}{'of matmul':>11}{'x before':>10}  {'right':9}")
    most = max(speed.values(), default=1)
    before = None
    for row in table:
        name, of = row["step"], speed.get("matmul")
        label = names.get(name) or "   " + COMPARED.get(name, name)
        share = f"{speed[name] / of:.0%}" if of and name != "matmul" else ""
        gain = f"{speed[name] / speed[before]:.2f}" if name in names and before else ""
        bar = "█" * max(1, round(36 * speed[name] / most))
        print(f"{label:32}{tflops(speed[name]):>8}{share:>11}{gain:>10}  {row['shapes_right']:9} {bar}")
        before = name if name in names else before


def show_recorded() -> None:
    if not RESULTS.exists():
        print("\nNo speeds are recorded yet (learn/results.csv).")
        return
    table = newest()
    title = f"Recorded {table[0]['date'][:10]} on {table[0]['gpu']}, commit {table[0]['commit']}"
    show(table, title, TIMED[0][1])


def facts(step: Step, arch: str) -> dict[str, int]:
    """Registers and stack of a thread, shared memory of a thread block; empty if not compiled here."""
    path = built(step, arch).with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else {}


def show_resources(ladder: list[Step], gpu: str | None) -> None:
    print(f"\n{'step':32}{'for':>8}{'registers':>11}{'stack':>7}{'shared memory':>15}")
    for step in ladder:
        arch = gpu if gpu and runs_on(step, gpu) else step.arch
        if arch and (found := facts(step, arch)):
            registers, stack, shared = found["registers"], found["stack"], found["shared_memory"] / 1024
            print(f"{step.number:2} {step.name:29}{arch:>8}{registers:11}{stack:7}{shared:12.0f} KB")


def newest() -> list[dict]:
    """The rows of the last recorded run."""
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        recorded = list(csv.DictReader(file))
    last = max(recorded, key=lambda row: row["date"])
    return [row for row in recorded if row["commit"] == last["commit"]]


def tflops(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"


def measured(step: Step, table: list[dict]) -> str:
    """What a step's page says of its speed."""
    speed = {(row["step"], int(row["seqlen"])): float(row["tflops"]) for row in table}
    ms = {(row["step"], int(row["seqlen"])): float(row["ms"]) for row in table}  # not rounded as much
    name, longest = step.key, TIMED[0][1]
    before = next((s.key for s in steps() if s.number == step.number - 1), ""), longest
    if (name, longest) not in speed:
        return "**Measured.** not yet"
    parts = []
    for _, seqlen, _ in TIMED:
        if (name, seqlen) in speed:
            parts.append(f"{tflops(speed[name, seqlen])} TFLOP/s at {seqlen:,} tokens")
    text = "**Measured.** " + ", ".join(parts)
    if before in speed:
        ratio = ms[before] / ms[name, longest] / (2 if step.causal else 1)
        text += f"; at {longest:,} {ratio:.3g} times step {step.number - 1}"
    if step.causal:
        text += " (which computes the whole matrix, and is counted as such)"
    right = next(row["shapes_right"] for row in table if row["step"] == name)
    return text + f". Right on {right} shapes. {table[0]['gpu']}, commit {table[0]['commit']}."


def ladder_table(table: list[dict]) -> str:
    """The table of README.md."""
    speed = {row["step"]: row for row in table if int(row["seqlen"]) == TIMED[0][1]}
    lines = [f"| step | lines added | TFLOP/s at {TIMED[0][1]:,} tokens |", "|---|---|---|"]
    ladder = steps()
    for old, step in zip([None, *ladder], ladder, strict=False):
        added = added_lines(old.path, step.path) if old else len(step.path.read_text().splitlines())
        name, row = step.name, speed.get(step.key)
        found = tflops(float(row["tflops"])) if row else "not measured yet"
        lines.append(f"| [{step.number} {name}]({step.path.stem}.md) | {added} | {found} |")
    for name, what in COMPARED.items():
        if name in speed:
            lines.append(f"| {what} | | {float(speed[name]['tflops']):.0f} |")
    return "\n".join(lines)


def texts() -> dict[Path, str]:
    """The pages, with what was measured filled in."""
    table, pages = newest(), {}
    for step in steps():
        page = step.path.with_suffix(".md")
        pages[page] = re.sub(r"\*\*Measured\.\*\*.*", lambda _, s=step: measured(s, table), page.read_text())
    readme = HERE / "README.md"
    between = f"<!-- ladder -->\n{ladder_table(table)}\n<!-- end -->"
    pages[readme] = re.sub(r"(?s)<!-- ladder -->.*<!-- end -->", lambda _: between, readme.read_text())
    return pages


def added_lines(old: Path, new: Path) -> int:
    """How many lines of `new` are not in `old`, by a diff of stripped lines, empty ones left out."""
    texts = [[line.strip() for line in p.read_text().splitlines() if line.strip()] for p in (old, new)]
    diff = difflib.unified_diff(*texts, n=0, lineterm="")
    return sum(line.startswith("+") and not line.startswith("+++") for line in diff)


def show_diff(old: Step, new: Step) -> None:
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if sys.stdout.isatty() else {}
    texts = [step.path.read_text().splitlines() for step in (old, new)]
    for line in difflib.unified_diff(*texts, old.path.name, new.path.name, lineterm=""):
        colour = colours.get(line[0], "")
        print(colour + line + ("\033[0m" if colour else ""))
    print(f"\n{added_lines(old.path, new.path)} lines added")


def on_gpu(ladder: list[Step], gpu: str, commit: str | None, beside: str | None) -> None:
    ladder = [step for step in ladder if runs_on(step, gpu)]
    compile_all([(step, gpu) for step in ladder if step.arch])
    functions = {step.key: load(step, gpu) for step in ladder}
    show_resources(ladder, gpu)
    right = count_right(ladder, functions, "cuda", SHAPES)
    table = []
    for size in TIMED if commit else TIMED[:1]:
        found = timed(ladder, functions, size, beside)
        table += rows(found, size, right, commit or "")
    show(table, f"Measured on {torch.cuda.get_device_name()}", TIMED[0][1])
    if commit:
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS.split(","), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(table)
        show(table, "The same", TIMED[1][1])


def on_cpu(ladder: list[Step]) -> None:
    print("There is no GPU here: the PyTorch steps run on the CPU, the others are compiled.\n")
    here = [step for step in ladder if step.arch is None]
    functions = {step.key: load(step, None) for step in here}
    q, k, v = inputs(1, 512, 512, 2, 0, "cpu")
    for name, right in count_right(here, functions, "cpu", SHAPES[:6]).items():
        start = time.perf_counter()
        functions[name](q, k, v)
        ms = 1e3 * (time.perf_counter() - start)
        print(f"{name}: right in {right} shapes; {ms:.0f} ms for 512 tokens, 2 heads")
    if importlib.util.find_spec("cutlass") is None:
        print("CuTe DSL is not here, so no step is compiled: pip install 'nvidia-cutlass-dsl[cu13]'")
    else:
        compile_all([(step, step.arch) for step in ladder if step.arch])
        show_resources(ladder, None)
    show_recorded()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", type=int, help="this one alone")
    parser.add_argument("--diff", type=int, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument(
        "--compile", metavar="ARCH", help="sm_80, sm_90a, ...: only compile, into learn/build"
    )
    parser.add_argument("--record", metavar="COMMIT", help="append what is measured to results.csv")
    parser.add_argument(
        "--beside", metavar="MODULE:FUNCTION", help="f(q, k, v, causal=) to time in the same turns"
    )
    parser.add_argument("--texts", action="store_true", help="fill what was recorded into the pages")
    options = parser.parse_args(words)
    ladder, gpu = steps(), gpu_arch()
    if options.texts:
        for page, text in texts().items():
            page.write_text(text)
        return
    if options.diff:
        numbered = {step.number: step for step in ladder}
        return show_diff(*(numbered[n] for n in options.diff))
    if options.step:
        ladder = [step for step in ladder if step.number == options.step]
    if options.compile:
        return compile_all(
            [(step, options.compile) for step in ladder if step.arch and runs_on(step, options.compile)]
        )
    if gpu:
        return on_gpu(ladder, gpu, options.record, options.beside)
    if options.record:
        parser.error("--record needs a GPU")
    on_cpu(ladder)


if __name__ == "__main__":
    main()
