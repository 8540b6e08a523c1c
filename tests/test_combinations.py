"""Features of the kernels together, as chance has it, in the emulator. Some faults need two of them.

python -m tests.test_combinations SEED SECONDS    # from this seed on, printing each combination
"""

import importlib.util
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":  # as pytest finds them
    sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("nvidia_cutlass_dsl") is None:
    pytest.skip("CuTe DSL, which compiles the kernels, is not there", allow_module_level=True)

from emulator import kernels
from emulator.kernels import Options
from error_rule import check_forward, check_gradients
from score_functions import MASKS, SCORES, functions
from test_emulator import CAUSAL, DROPOUT, SINKS, SM80, SM90, WINDOW, attended, dense, integers, row_of, spans
from test_emulator import random as normal

from mini_flash_attention import create_block_mask
from mini_flash_attention.gpu import config

LENGTHS = (60, 0, 30, 5), (90, 20, 40, 0)  # of packed sequences
HEAD_DIMS = {"sm80": (64, 96, 128), "sm90": (64, 96, 128, 192, 256)}


class Combination(NamedTuple):
    case: dict[str, Any]
    backward: bool
    ragged: bool
    sizes: tuple[int, int]  # of queries and keys, of all sequences
    heads: tuple[int, int]
    names: list[str]  # of score_functions
    options: Options
    features: dict[str, bool]
    heads_per_tile: int
    with_dlse: bool


def drawn(seed: int) -> Combination:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    path = chance.choice((SM80, SM90))
    dtype = chance.choice((torch.bfloat16, torch.float16))
    case = path | {"d": chance.choice(HEAD_DIMS[path["path"]]), "dtype": dtype}
    backward, ragged = chance.random() < 0.6, chance.random() < 0.35
    heads = chance.choice(((2, 1), (2, 2)))
    sizes = chance.choice(((140, 200), (70, 130), (200, 70)))
    if ragged:
        sizes = sum(LENGTHS[0]), sum(LENGTHS[1])
    batch = len(LENGTHS[0]) if ragged else 1
    names = [chance.choice(SCORES)] * (chance.random() < 0.45) + [chance.choice(MASKS)] * (
        chance.random() < 0.4
    )
    given: dict[str, Any] = {"window": chance.choice(((None, None), (None, None), CAUSAL, WINDOW))}
    for name in names:
        given |= functions(name, batch, heads[0], max(sizes))
    some = {
        "softcap": (5.0, 0.35),
        "slopes": (torch.rand(batch, heads[0]), 0.35),
        "dropout": (DROPOUT, 0.45),
        "sinks": (SINKS, 0.35),
    }
    given |= {name: value for name, (value, often) in some.items() if chance.random() < often}
    features = {"ragged": ragged}
    visits_blocks = not (ragged or (backward and path is SM80)) and given["window"] == (None, None)
    if "mask_mod" in given and visits_blocks and chance.random() < 0.6:
        given["block_mask"] = create_block_mask(given["mask_mod"], 1, heads[0], *sizes)
        features["sparse"] = True
    if backward:
        features["deterministic"] = "sparse" not in features and chance.random() < 0.25
    else:
        features["sinks"] = "sinks" in given
    per = chance.choice((1, heads[0] // heads[1]))
    return Combination(
        case, backward, ragged, sizes, heads, names, Options(**given), features, per, chance.random() < 0.5
    )


def check(x: Combination) -> None:
    q, k, v = dense(x.case, sq=x.sizes[0], sk=x.sizes[1], h=x.heads[0], hk=x.heads[1])
    sequences, places = None, [(None, slice(None), slice(None))]
    if x.ragged:
        starts = [integers(0, *torch.tensor(lengths).cumsum(0)) for lengths in LENGTHS]
        batch = {"batch": len(LENGTHS[0]), "longest": max(LENGTHS[0])}
        sequences = kernels.ragged(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], **batch)
        places = [(b, *its) for b, its in enumerate(zip(*map(spans, starts), strict=True)) if LENGTHS[0][b]]
    parts = [(rows, keys, x.options.reference(q[:, rows], k[:, keys], b)) for b, rows, keys in places]
    row = row_of(config.backward if x.backward else config.forward, x.case, x.options, **x.features)
    if not x.backward:
        out, lse = kernels.forward(row, q, k, v, x.options, sequences, num_sms=1)
        for rows, keys, reference in parts:
            its = q[:, rows], k[:, keys], v[:, keys]
            check_forward(out[:, rows], lse[:, :, rows], *its, **reference)
        return
    out, lse = attended(q, k, v, parts)
    dout, dlse = normal(*out.shape, dtype=q.dtype), torch.randn_like(lse) if x.with_dlse else None
    gradients = kernels.backward(
        row, q, k, v, out, dout, lse, dlse, x.options, sequences, num_sms=1, heads_per_tile=x.heads_per_tile
    )

    def of(tensor: Tensor | None, rows: slice) -> Tensor | None:
        return None if tensor is None else tensor[..., rows]

    for rows, keys, reference in parts:
        its = q[:, rows], k[:, keys], v[:, keys]
        found = gradients[0][:, rows], gradients[1][:, keys], gradients[2][:, keys]
        check_gradients(found, dout[:, rows], of(dlse, rows), *its, **reference)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [*range(10), 208])  # 208: a tile without queries, whose K was released early
def test_together(seed: int) -> None:
    check(drawn(seed))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    seed, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        combination = drawn(seed)
        shown = combination._replace(
            options=[k for k, v in combination.options._asdict().items() if v is not None]
        )
        print(seed, *shown, flush=True)
        check(combination)
        seed += 1
