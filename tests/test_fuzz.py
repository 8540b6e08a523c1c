"""Random calls: none is wrong, planted faults are found, and a failure is printed so that it repeats."""

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mini_flash_attention
from mini_flash_attention import backend, checks, cpu, problem, sinks
from mini_flash_attention.problem import Inputs, Problem
from tests.fuzz import __main__ as fuzz
from tests.fuzz.call import Call
from tests.fuzz.known import known


def assert_nothing_is_wrong(seconds: int, device: str, shown: pytest.CaptureFixture[str]) -> None:
    """With a new seed each time; what fails is printed with it."""
    status = fuzz.main(["--seconds", str(seconds), "--device", device])
    printed = shown.readouterr().out
    assert status == 0, printed
    assert "invalid calls are right" in printed


def test_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert_nothing_is_wrong(5, "cpu", capsys)


@pytest.mark.full
def test_nothing_is_wrong_for_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    assert_nothing_is_wrong(60, "cpu", capsys)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_nothing_is_wrong_on_a_gpu(gpu: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    assert_nothing_is_wrong(300, "cuda", capsys)


def forget() -> None:
    """Nothing is remembered of calls by another rule."""
    for function in vars(problem).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def no_memory() -> Iterator[None]:
    forget()
    yield
    forget()


def first_failure(calls: int = 400) -> tuple[Call, Exception]:
    for call in itertools.islice(fuzz.calls(0, "cpu"), calls):
        failure = call.run()
        if failure is not None and not known(call, failure):
            return call, failure
    pytest.fail(f"none of {calls} calls found it")


Faulty = Callable[[Callable[..., Any]], Callable[..., Any]]  # makes a faulty function of a right one


def problem_with(**changes: Callable[[Problem], Any]) -> Faulty:
    """Something in the problem is another one."""

    def faulty(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(problem: Problem, *rest: Any) -> Any:
            return function(replace(problem, **{name: new(problem) for name, new in changes.items()}), *rest)

        return changed

    return faulty


def one_more(limit: int | None) -> int | None:
    return None if limit is None else limit + 1


def without_used(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of a sequence's room is read."""

    def faulty(problem: Problem, x: Inputs, *rest: Any) -> Any:
        if x.layout is not None and problem.packed_k:
            x = x._replace(layout=x.layout._replace(seqused_k=None))
        return function(problem, x, *rest)

    return faulty


def without_dlse(backward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda problem, x, out, lse, dout, dlse: backward(problem, x, out, lse, dout, None)


def without_dlse_of_sinks(gradient: Callable[..., Any]) -> Callable[..., Any]:
    return lambda s_aux, out, lse, dout, dlse: gradient(s_aux, out, lse, dout, None)


def a_token_later(append: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(problem: Problem, x: Inputs, update: Any) -> Any:
        return append(problem, x, update._replace(k=update.k.roll(1, dims=1)))

    return faulty


def nothing_written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The last query's result stays what was in its memory."""

    def faulty(problem: Problem, x: Inputs, out: Tensor | None = None) -> Any:
        right, lse = forward(problem, x, out)
        if right.numel() > 0 and out is None and not problem.ragged:
            right[:, -1] = torch.empty_like(right[:, -1])
        return right, lse

    return faulty


def twice_as_large(pad: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(pad)(lambda **given: 2 * pad(**given))


def without_the_last(unpad: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(unpad)
    def faulty(**given: Tensor) -> Any:
        packed, indices, *rest = unpad(**given)
        return packed[:-1], indices[:-1], *rest

    return faulty


@pytest.mark.full
@pytest.mark.timeout(600)  # up to 400 calls, each shortened and judged many times
@pytest.mark.parametrize(
    "owner, name, faulty, found",
    [
        (cpu, "forward", problem_with(window_left=lambda p: one_more(p.window_left)), "largest error"),
        (cpu, "forward", problem_with(window_right=lambda p: one_more(p.window_right)), "largest error"),
        (cpu, "forward", problem_with(softmax_scale=lambda p: 1.001 * p.softmax_scale), "largest error"),
        (cpu, "forward", problem_with(softcap=lambda p: 0), "largest error"),
        (cpu, "forward", without_used, "error|NaN"),
        (cpu, "forward", nothing_written, "error|NaN"),
        (cpu, "backward", without_dlse, "gradient of [qk]"),
        (cpu, "backward", problem_with(window_left=lambda p: one_more(p.window_left)), "gradient of"),
        (cpu, "backward", problem_with(dropout_p=lambda p: 0.9 * p.dropout_p), "gradient of"),
        (sinks, "gradient", without_dlse_of_sinks, "gradient of s_aux"),
        (cpu, "dropout_probabilities", problem_with(dropout_p=lambda p: p.dropout_p / 2), "dropped|error"),
        (backend.kv_append, "append", a_token_later, "cache is not what it must be"),
        (backend.kv_append, "rotate", lambda rotate: lambda x, update, positions: x, "cache|lse|out"),
        (mini_flash_attention, "pad_input", twice_as_large, "padded"),
        (mini_flash_attention, "unpad_input", without_the_last, "error|hidden_states|indices"),
    ],
    ids=[
        *("window_left", "window_right", "softmax_scale", "softcap", "seqused_k", "uninitialised", "dlse"),
        *("backward_window", "backward_dropout", "sinks", "S_dmask", "append", "rotary", "pad", "unpad"),
    ],
)
def test_faults_are_found(
    owner: Any, name: str, faulty: Faulty, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, faulty(getattr(owner, name)))
    call, failure = first_failure()
    assert call.wrong is None and type(failure) is AssertionError and re.search(found, str(failure)), failure


@pytest.mark.full
@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    "rule, lax, error, found",
    [
        ("flag", lambda name, value: False, AssertionError, "takes it"),
        ("limit", lambda side, value: None, AssertionError, "takes it"),
        ("splits", lambda num_splits: None, AssertionError, "takes it"),
        ("rank", lambda *facts: {}["rank"], KeyError, "rank"),
        ("integer", lambda name, value: int("an int, please"), AssertionError, "the error does not tell"),
    ],
)
def test_lax_rules_are_found(
    rule: str, lax: Callable[..., Any], error: type, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(checks, rule)

    def faulty(*arguments: Any) -> Any:
        """The rule, where it lets pass."""
        try:
            return right(*arguments)
        except (TypeError, ValueError):
            return lax(*arguments)

    monkeypatch.setattr(checks, rule, faulty)
    call, failure = first_failure()
    assert call.wrong is not None and type(failure) is error and found in str(failure), failure


def test_a_failure_is_printed_as_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the arguments that it does not need, with the seed; and the script fails alike."""
    monkeypatch.setattr(cpu, "backward", without_dlse(cpu.backward))
    arguments = ["--seconds", "100", "--seed", "3"]
    assert fuzz.main(arguments) == 1
    printed = capsys.readouterr().out
    _, script = printed.split("\n", 1)
    script, _, message = script.rpartition("\n\n")
    assert script.startswith("# python -m tests.fuzz --seed 3 --device cpu, call ")
    assert len(script.splitlines()) <= 20 and "dlse = " in script and "softcap" not in script
    with pytest.raises(AssertionError) as failure:
        exec(script, {})
    assert message.strip() == f"AssertionError: {failure.value}"
    assert fuzz.main(arguments) == 1 and capsys.readouterr().out == printed


@pytest.mark.full
def test_calls_reach_every_function_and_argument() -> None:
    """Each argument is given in a valid call and wrong in an invalid one."""
    made_before_calls = (
        "BlockMask",
        "create_block_mask",
    )  # these have their own random tests, as functions have
    names = [name for name in mini_flash_attention.__all__[1:] if name not in made_before_calls]
    functions = {name: getattr(mini_flash_attention, name) for name in names}
    missing = {
        (name, argument, kind)
        for name, function in functions.items()
        for argument in inspect.signature(function).parameters
        if argument not in ("score_mod", "mask_mod", "block_mask")
        for kind in ("valid", "wrong")
    }
    for call in itertools.islice(fuzz.calls(0, "cpu"), 10_000):
        if call.wrong is None:
            given = {*call.tensors, *call.numbers}
            missing -= {(call.function, argument, "valid") for argument in given}
        else:
            missing -= {(call.function, argument, "wrong") for argument in call.wrong.names}
        if not missing:
            break
    assert not missing
