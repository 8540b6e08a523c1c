"""`python -m tests.fuzz`: random calls until time is up, or until one is wrong, which is printed."""

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

import torch

from mini_flash_attention.gpu import config
from tests.fuzz.call import Call, shortened
from tests.fuzz.known import known
from tests.fuzz.valid import valid
from tests.fuzz.wrong import wrong

WRONG_SHARE = 3 / 13


def main(arguments: list[str] | None = None) -> int:
    """0 if no call is wrong but in a known way."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=60, help="how long, %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors are, %(default)s")
    add("--seed", type=int, help="of the calls; another one each time if not given")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"fuzz: seed {seed} on {args.device}", flush=True)
    stop, done = time.monotonic() + args.seconds, Counter()
    for number, call in enumerate(calls(seed, args.device)):
        failure = call.run()
        what = failure and known(call, failure)
        if what:
            done[what] += 1
        elif failure:
            print(report(call, failure, f"--seed {seed} --device {args.device}, call {number}"))
            return 1
        else:
            done["valid" if call.wrong is None else "invalid"] += 1
        if time.monotonic() > stop:
            break
    print(f"{done.pop('valid', 0)} valid and {done.pop('invalid', 0)} invalid calls are right")
    for what, count in done.items():
        print(f"{count} are wrong as known: {what}")
    return 0


def calls(seed: int, device: str) -> Iterator[Call]:
    """Random calls, the same ones for a seed."""
    paths = forced_paths(device)
    number = 0
    while True:
        call = valid(seed, number, device, paths)
        random = Random(f"{seed}-{number}")
        yield wrong(call, random) if random.random() < WRONG_SHARE else call
        number += 1


def forced_paths(device: str) -> Sequence[str]:
    """What MINI_FLASH_ATTENTION_BACKEND may be, "" for nothing; on a GPU sometimes the CPU backend too."""
    if device == "cpu":
        return ("",)
    paths = config.paths(config.gpu_arch(torch.cuda.get_device_capability()))
    return ("", "", "", *paths, "cpu")


def report(call: Call, failure: Exception, where: str) -> str:
    """A script that shows the failure, and the failure."""
    short = shortened(call, failure)
    again = short.run() or failure
    return f"# python -m tests.fuzz {where}\n{short.script}\n\n{type(again).__name__}: {again}"


if __name__ == "__main__":
    sys.exit(main())
