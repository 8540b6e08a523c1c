"""learn/: its steps against the formula, what they compile to, how little changes from one to the next."""

import ast
import csv
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

LEARN = Path(__file__).parent.parent / "learn"
sys.path.insert(0, str(LEARN))
import run  # noqa: E402, learn/run.py

STEPS = run.steps()
TORCH = [step for step in STEPS if step.arch is None]
CUTE = [step for step in STEPS if step.arch]
MOST_ADDED = 60
TURNS = {(2, 3), (6, 7)}  # to another language; to other instructions for products and copies

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None, reason="needs CuTe DSL, which compiles the steps"
)


def one_for_every_run(steps: list[run.Step], number: int) -> list:
    return [
        pytest.param(s, marks=() if s.number == number else pytest.mark.full, id=s.path.stem) for s in steps
    ]


def assert_right(step: run.Step, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    ref, low = (run.formula(q, k, v, step.causal, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert run.is_right(out, ref, low), (out.float() - ref).abs().max()


def test_steps_are_numbered_through() -> None:
    assert [step.number for step in STEPS] == list(range(1, len(STEPS) + 1))


@pytest.mark.parametrize("old, new", list(itertools.pairwise(STEPS)), ids=lambda step: str(step.number))
def test_a_step_adds_few_lines(old: run.Step, new: run.Step) -> None:
    if (old.number, new.number) not in TURNS:
        assert run.added_lines(old.path, new.path) <= MOST_ADDED


def test_added_lines(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("a\nb\n\nc\n")
    new.write_text("a\n    b\nx\n\n\ny\nc\n")  # indented anew, two added, empty ones
    assert run.added_lines(old, new) == 2


def test_size() -> None:
    assert sum(len(path.read_text().splitlines()) for path in LEARN.glob("*.py")) <= 3000


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_neither_imports_the_other() -> None:
    assert not any("mini_flash_attention" in imports(path) for path in LEARN.glob("*.py"))
    package = (LEARN.parent / "mini_flash_attention").rglob("*.py")
    ours = {"learn", "helpers", "run", *(step.path.stem for step in STEPS)}
    assert not any(imports(path) & ours for path in package)


@pytest.mark.parametrize("step", TORCH, ids=lambda step: step.path.stem)
@pytest.mark.parametrize("shape", [(1, 128, 128, 1), (2, 100, 300, 3), (1, 300, 77, 2)], ids=str)
def test_pytorch_step(step: run.Step, shape: tuple[int, ...]) -> None:
    q, k, v = run.inputs(*shape, 0, "cpu")
    attention = run.load(step, None)
    assert_right(step, attention(q, k, v), q, k, v)
    exact = run.formula(q, k, v, False, torch.float64)
    torch.testing.assert_close(attention(*(x.float() for x in (q, k, v))), exact.float())


def test_a_wrong_result_is_found_out() -> None:
    q, k, v = run.inputs(1, 128, 256, 1, 0, "cpu")
    ref, low = (run.formula(q, k, v, False, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert run.is_right(ref.bfloat16(), ref, low)
    for change in (
        lambda x: x * 1.05,
        lambda x: x.roll(1, 1),
        lambda x: x.index_fill(1, torch.tensor([7]), 0),
    ):
        assert not run.is_right(change(ref).bfloat16(), ref, low)
    unwritten = ref.bfloat16()
    unwritten[0, 0, 0, 0] = float("nan")
    assert not run.is_right(unwritten, ref, low)


def test_the_formula_is_pytorchs() -> None:
    q, k, v = run.inputs(2, 96, 96, 2, 0, "cpu")
    for causal in (False, True):
        heads_first = (x.transpose(1, 2).double() for x in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
        ours = run.formula(q, k, v, causal, torch.float64)
        torch.testing.assert_close(ours, theirs.transpose(1, 2))


def branch(name: str):
    return run.imported(STEPS[0]._replace(path=LEARN / f"{name}.py"))


def test_backward_formulas() -> None:
    backward = branch("backward_formulas")
    q, k, v, dO = (torch.randn(2, s, 3, 64, dtype=torch.float64) for s in (150, 300, 300, 150))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(run.formula(*inputs, False, torch.float64), inputs, dO)
    O, lse = backward.forward(q, k, v)
    for gradients in (backward.backward_formula(q, k, v, dO), backward.backward_tiles(q, k, v, O, lse, dO)):
        for got, ref in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got.double(), ref, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("splits", [1, 2, 7, 100])
@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_decode_splits(splits: int, heads_k: int) -> None:
    q, k, v = torch.randn(2, 3, 4, 64), *torch.randn(2, 2, 100, heads_k, 64)
    k = k * torch.linspace(1, 40, 100)[:, None, None]  # splits whose scores differ by much
    repeated = [x.repeat_interleave(4 // heads_k, dim=2) for x in (k, v)]
    expected = run.formula(q, *repeated, False, torch.float64)
    torch.testing.assert_close(
        branch("decode_splits").attention(q, k, v, splits), expected.float(), atol=1e-5, rtol=1e-4
    )


def test_num_splits() -> None:
    num_splits = branch("decode_splits").num_splits
    assert num_splits(1, 8, 32768) == 16 and num_splits(1, 8, 1000) == 7
    assert num_splits(200, 8, 32768) == num_splits(1, 1, 5) == 1


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", one_for_every_run(CUTE, 8))
def test_compiles_without_a_stack(step: run.Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BUILD", tmp_path)
    run.compile_step(step, step.arch)
    facts = run.facts(step, step.arch)
    assert facts["stack"] == 0
    assert 0 < facts["registers"] <= 255
    assert run.find(step, step.arch).stat().st_size > 0


def emulated(step: run.Step):
    from emulator.capture import Library, link

    def compile_to(step: run.Step, folder: Path) -> str:
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_fake_stream

        module = run.imported(step)

        @cute.jit
        def launch(call, stream):
            module.launch(*call, stream)

        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        options = f"--enable-tvm-ffi --gpu-arch {step.arch} --keep-ptx --dump-dir {folder}"
        return link(cute.compile(launch, tuple(run.arguments(step)), stream, options=options), folder)

    return Library(step, compile_to)


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", one_for_every_run(CUTE, 5))
def test_emulated(step: run.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed by the emulator, which finds races: two tiles or more of two heads, on one SM."""
    from emulator import emulate

    launches = []
    execute = emulate.execute
    monkeypatch.setattr(
        emulate, "execute", lambda found, memory: launches.extend(found) or execute(found, memory)
    )
    library = emulated(step)
    for growth in (0, 20, -20):  # growing and falling scores: the exceptions of step 11 on
        q, k, v = run.inputs(1, 256, 384, 2, growth, "cpu")
        out = torch.empty_like(q)
        counter = torch.zeros(2, dtype=torch.int32)
        more = (counter, 1) if run.persistent(step) else ()
        assert not emulate.emulate(library, (q, k, v, out, *more), unwritten=(out,))
        assert_right(step, out, q, k, v)
        assert counter.tolist() == [0, 0]
    stated = run.imported(step).SHARED_MEMORY
    assert stated <= launches[0].shared_memory <= stated + 1024


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", CUTE, ids=lambda step: step.path.stem)
def test_on_a_gpu(step: run.Step, gpu: torch.device) -> None:
    arch = run.gpu_arch()
    if not run.runs_on(step, arch):
        pytest.skip(f"step {step.number} does not run on {arch}")
    run.compile_all([(step, arch)])
    right = run.count_right([step], {step.key: run.load(step, arch)}, "cuda", run.SHAPES)[step.key]
    count, checked = map(int, right.split(" / "))
    assert count == checked >= 20


def test_recorded_rows_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    row = dict.fromkeys(run.FIELDS.split(","), "") | {"gpu": "some GPU", "seqlen": 16384}
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.csv")
    run.show_recorded()
    with run.RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.FIELDS.split(","))
        writer.writeheader()
        for commit, step, tflops in (
            ("old", "formula", 999),
            ("new", "formula", 50),
            ("new", "tiles", 100),
            ("new", "matmul", 400),
        ):
            date = "2026-01-02" if commit == "new" else "2026-01-01"
            writer.writerow(row | {"commit": commit, "date": date, "step": step, "tflops": tflops})
    run.show_recorded()
    printed = capsys.readouterr().out
    assert "No speeds are recorded" in printed and "Recorded 2026-01-02 on some GPU, commit new" in printed
    assert "999" not in printed and "25%" in printed and "2.00" in printed


def test_diff(capsys: pytest.CaptureFixture) -> None:
    run.main(["--diff", "8", "9"])
    printed = capsys.readouterr().out
    assert "+def my_turn(wg):" in printed and "lines added" in printed


def test_pages_say_what_was_recorded() -> None:
    for page, text in run.texts().items():
        assert page.read_text() == text, f"python learn/run.py --texts would change {page.name}"


def test_measured_is_of_the_results() -> None:
    row = {"gpu": "some GPU", "commit": "abc", "seqlen": "16384", "shapes_right": "26 / 26"}
    table = [row | {"step": "wgmma", "tflops": "400.0", "ms": "3"}]
    table += [row | {"step": "overlap", "tflops": "600.0", "ms": "2"}]
    text = run.measured(STEPS[7], table)
    assert "600 TFLOP/s at 16,384 tokens" in text and "1.5 times step 7" in text and "abc" in text
    assert run.measured(STEPS[8], table) == "**Measured.** not yet"
