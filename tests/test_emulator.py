"""The kernels, executed by the emulator; and faults that it must find: planted ones, and the kernels' own
with a barrier or a wait taken out."""

import dataclasses
import functools
import importlib.util
import operator
import re

import pytest
import torch
from emulator import kernels, ptx
from emulator.block import execute
from emulator.capture import Launch
from emulator.kernels import Options
from emulator.memory import (
    DEADLOCK,
    MISALIGNED,
    OUT_OF_BOUNDS,
    RACE,
    UNWRITTEN_READ,
    Fault,
    Global,
)
from error_rule import assert_lse, check_forward, check_gradients
from random_scores import random_functions
from score_functions import functions
from torch import Tensor

from mini_flash_attention import create_block_mask
from mini_flash_attention.gpu import config
from mini_flash_attention.reference import attention

if importlib.util.find_spec("nvidia_cutlass_dsl") is None:
    pytest.skip("CuTe DSL, which compiles the kernels, is not there", allow_module_level=True)

# Planted faults: %rd1 is the address of 256 bytes of global memory, %r1 the number of the thread, %r2 the
# address of its own word in shared memory, %r3 that of the first word, %r4 the next thread's word.

HEAD = """
.visible .entry planted(.param .u64 memory) {
  .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
  ld.param.b64 %rd1, [memory];
  mov.u32 %r1, %tid.x;
  mov.b32 %r3, __dynamic_shmem__0;
  shl.b32 %r5, %r1, 2;
  add.s32 %r2, %r3, %r5;
  xor.b32 %r6, %r5, 4;
  add.s32 %r4, %r3, %r6;
  setp.eq.s32 %p1, %r1, 0;
"""


def run(body: str, written: int = 256, launches: int = 1, overlap: bool = False) -> Global:
    """Runs 64 threads with 1 KB of shared memory; `written` bytes of global memory are."""
    memory = Global(1 << 20)
    address = memory.allocate(256, bytes(256) if written else None)
    (kernel,) = ptx.parse(HEAD + body + "\n  ret;\n}")
    arguments = [address.to_bytes(8, "little")]
    launch = Launch(kernel, (1, 1, 1), (64, 1, 1), 1024, arguments)
    execute([launch, *[launch._replace(overlaps=overlap)] * (launches - 1)], memory)
    return memory


COPY = "setp.lt.s32 %p2, %r1, 16; shl.b32 %r7, %r1, 4; cvt.s64.s32 %rd2, %r7; add.s64 %rd3, %rd1, %rd2; "
COPY += "add.s32 %r8, %r3, %r7; @%p2 cp.async.cg.shared.global [%r8], [%rd3], 16; "
COPY += "cp.async.commit_group; HERE bar.sync 0; ld.shared.b32 %r9, [%r2];"

BARRIER = "@%p1 mbarrier.init.shared.b64 [%r3+512], 1; @%p1 fence.mbarrier_init.release.cluster; "
BARRIER += "bar.sync 0; @!%p1 bra $done; "
LOAD = BARRIER + (
    "mbarrier.arrive.expect_tx.shared.b64 %rd2, [%r3+512], 64; "
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 64, [%r3+512]; "
    "HERE ld.shared.b32 %r9, [%r3]; $done:"
)
WAIT = "$wait: mbarrier.try_wait.parity.shared.b64 %p3, [%r3+512], 0; @!%p3 bra $wait;"
STORE = (
    "st.shared.b32 [%r2], %r1; HERE bar.sync 0; @!%p1 bra $done; "
    "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 64; cp.async.bulk.commit_group; "
    "THERE st.shared.b32 [%r3], 7; WHERE $done:"
)
FENCE, READ = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"

# kind, text, what stands at HERE, THERE and WHERE where all is well; and, if not nothing, in the faulty one
PLANTED = {
    "a word that the next thread writes": (
        RACE,
        "st.shared.b32 [%r2], %r1; HERE ld.shared.b32 %r9, [%r4];",
        {"HERE": "bar.sync 0;"},
    ),
    "a word that the next lane writes": (
        RACE,
        "st.shared.b32 [%r2], %r1; HERE ld.shared.b32 %r9, [%r4];",
        {"HERE": "bar.warp.sync -1;"},
    ),
    "a word that the next lane still reads": (
        RACE,
        "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r9, [%r4]; HERE st.shared.b32 [%r2], 7;",
        {"HERE": "bar.sync 0;"},
    ),
    "two values for one word": (RACE, "st.shared.b32 [%r3], HERE;", {"HERE": "7"}, {"HERE": "%r1"}),
    "a copy that nobody waits for": (RACE, COPY, {"HERE": "cp.async.wait_group 0;"}),
    "a copy of which one group may be on its way": (
        RACE,
        COPY,
        {"HERE": "cp.async.wait_group 0;"},
        {"HERE": "cp.async.wait_group 1;"},
    ),
    "a barrier that one warp misses": (
        DEADLOCK,
        "setp.lt.s32 %p2, %r1, 32; @HERE bra $out; bar.sync 0; $out:",
        {"HERE": "%p0"},  # false
        {"HERE": "%p2"},
    ),
    "a barrier of another count": (DEADLOCK, "bar.sync 1, HERE;", {"HERE": "64"}, {"HERE": "96"}),
    "an mbarrier at which nobody arrives": (
        DEADLOCK,
        BARRIER + "HERE " + WAIT + " $done:",
        {"HERE": "mbarrier.arrive.shared.b64 %rd2, [%r3+512], 1;"},
    ),
    "a load that nobody waits for": (RACE, LOAD, {"HERE": WAIT}),
    "a load that does not see its mbarrier": (
        RACE,
        LOAD.replace("HERE", WAIT).replace("fence.mbarrier_init.release.cluster", "HERE"),
        {"HERE": "fence.mbarrier_init.release.cluster"},
        {"HERE": "mov.b32 %r9, 0"},
    ),
    "a load still on its way at the end": (
        RACE,
        LOAD.replace("ld.shared.b32 %r9, [%r3]; ", ""),
        {"HERE": WAIT},
    ),
    "a store that does not see what is written": (
        RACE,
        STORE,
        {"HERE": FENCE, "THERE": READ, "WHERE": ""},
        {"HERE": "", "THERE": READ, "WHERE": ""},
    ),
    "a word that a store still reads": (
        RACE,
        STORE,
        {"HERE": FENCE, "THERE": READ, "WHERE": ""},
        {"HERE": FENCE, "THERE": "", "WHERE": READ},
    ),
    "global memory of nobody": (
        OUT_OF_BOUNDS,
        "cvt.s64.s32 %rd2, %r5; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3+HERE], %r1;",
        {"HERE": "0"},
        {"HERE": "4"},
    ),
    "shared memory of nobody": (
        OUT_OF_BOUNDS,
        "st.shared.b32 [%r2+HERE], %r1;",
        {"HERE": "768"},
        {"HERE": "772"},
    ),
    "an odd address": (
        MISALIGNED,
        "ld.global.v2.b32 {%r9, %r10}, [%rd1+HERE];",
        {"HERE": "8"},
        {"HERE": "4"},
    ),
}


def fill(text: str, parts: dict[str, str]) -> str:
    return re.sub("HERE|THERE|WHERE", lambda match: parts.get(match[0], ""), text)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault(name: str) -> None:
    kind, text, mended, *broken = PLANTED[name]
    run(fill(text, mended))
    with pytest.raises(Fault) as fault:
        run(fill(text, broken[0] if broken else {}))
    assert fault.value.kind == kind


def test_unwritten_global_memory() -> None:
    body = "ld.global.b32 %r9, [%rd1];"
    run(body)
    with pytest.raises(Fault) as fault:
        run(body, written=0)
    assert fault.value.kind == UNWRITTEN_READ


def test_unwritten_shared_memory() -> None:
    """It is reported, and reads as all bits set."""
    body = "@%p1 ld.shared.b32 %r9, [%r3+64]; @%p1 st.global.b32 [%rd1], %r9;"
    memory = run(body)
    assert len(memory.unwritten_reads) == 1
    assert (memory.bytes(memory.allocations[0][0], 4) == 255).all()
    assert not run("@%p1 st.shared.b32 [%r3+64], 1;" + body).unwritten_reads


def test_what_a_launch_before_writes() -> None:
    """A launch that may overlap the one before must wait for it."""
    body = "cvt.s64.s32 %rd2, %r5; add.s64 %rd3, %rd1, %rd2; HERE ld.global.b32 %r9, [%rd3]; "
    body += "st.global.b32 [%rd3], %r1;"
    run(fill(body, {}), launches=2)
    run(fill(body, {"HERE": "griddepcontrol.wait;"}), launches=2, overlap=True)
    with pytest.raises(Fault) as fault:
        run(fill(body, {}), launches=2, overlap=True)
    assert fault.value.kind == RACE


# The kernels


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SM80 = {"path": "sm80", "arch": "sm_80"}
SM80_ON_SM90 = {"path": "sm80", "arch": "sm_90a"}
SM90 = {"path": "sm90", "arch": "sm_90a"}
CAUSAL, WINDOW = (None, 0), (30, 10)
SINKS = torch.tensor([1.0, 12.0])
DROPOUT = (123456789, 0.2)


def dense(case: dict, b: int = 1, sq: int = 100, sk: int = 150, h: int = 2, hk: int = 1) -> tuple:
    dtype, d = case.get("dtype", torch.bfloat16), case["d"]
    q = random(b, sq, h, d, dtype=dtype)
    return q, random(b, sk, hk, d, dtype=dtype), random(b, sk, hk, d, dtype=dtype)


def row_of(make, case: dict, options: Options, **features):
    dtype = str(case.get("dtype", torch.bfloat16)).removeprefix("torch.")
    features |= {"score": options.score, "dropout": options.dropout is not None}
    where = case["path"], case["arch"], dtype, config.bucket(case["d"]), options.mask
    return make(*where, **features)


def slopes(batch: int, heads: int) -> Tensor:
    return torch.rand(batch, heads)


# Two query blocks of two heads, in one or two thread blocks, that see three blocks of keys or less.
FORWARD = {
    "sm80": (SM80 | {"d": 64}, {"window": CAUSAL}),
    "sm80-scores": (
        SM80 | {"d": 72, "dtype": torch.float16},
        {"window": WINDOW, "softcap": 5.0, "slopes": torch.tensor([[0.5, 0.25]])},
    ),
    "sm80-dropout": (SM80 | {"d": 128}, {"dropout": DROPOUT}),
    "sm80-sinks": (SM80 | {"d": 64}, {"window": WINDOW, "sinks": SINKS, "softcap": 5.0}),
    "sm90": (SM90 | {"d": 64}, {"window": CAUSAL}),
    "sm90-128": (SM90 | {"d": 128}, {}),
    "sm90-sinks": (SM90 | {"d": 64}, {"window": CAUSAL, "sinks": SINKS}),
    "sm90-scores": (
        SM90 | {"d": 96, "dtype": torch.float16},
        {"window": CAUSAL, "softcap": 5.0, "slopes": torch.tensor([[0.5, 0.25]])},
    ),
    "sm90-dropout": (SM90 | {"d": 256}, {"dropout": DROPOUT}),
    "sm80-functions": (SM80 | {"d": 64}, functions("awkward", 1, 2, 270)),
    "sm90-functions": (SM90 | {"d": 64}, {"window": CAUSAL} | functions("awkward", 1, 2, 270)),
    "sm90-late": (SM90 | {"d": 128}, functions("late", 1, 2, 270) | functions("relative_bias", 1, 2, 270)),
}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    case, changes = FORWARD[name]
    options = Options(**changes)
    q, k, v = dense(case, sq=200, sk=270)
    row = row_of(config.forward, case, options, sinks=options.sinks is not None)
    out, lse = kernels.forward(row, q, k, v, options, num_sms=1)
    check_forward(out, lse, q, k, v, **options.reference(q, k))


def with_blocks(batch: int, heads: int, seqlen_q: int, seqlen_k: int, *names: str) -> dict:
    """Functions, with the blocks of their mask."""
    given = functools.reduce(
        operator.or_, (functions(name, batch, heads, max(seqlen_q, seqlen_k)) for name in names)
    )
    sizes = batch, heads, seqlen_q, seqlen_k
    return given | {"block_mask": create_block_mask(given["mask_mod"], *sizes)}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path, d, names",
    [
        (SM90, 64, ("documents",)),
        (SM90, 128, ("late", "relative_bias")),
        (SM90, 192, ("sink_window",)),
        (SM80, 64, ("late", "relative_bias")),
        (SM80, 256, ("documents",)),
    ],
)
def test_block_mask(path: dict, d: int, names: tuple[str, ...]) -> None:
    """Forward and backward, whose blocks are none, partial and full; heads share a key head."""
    case, sizes = path | {"d": d}, (300, 520)
    options = Options(**with_blocks(1, 2, *sizes, *names))
    q, k, v = dense(case, sq=sizes[0], sk=sizes[1])
    out, lse = kernels.forward(
        row_of(config.forward, case, options, sparse=True), q, k, v, options, num_sms=1
    )
    check_forward(out, lse, q, k, v, **options.reference(q, k))
    out, lse = attention(q, k, v, **options.reference(q, k), dtype=torch.float32)
    out, dout = out.to(q.dtype), random(*out.shape, dtype=q.dtype)
    if case["path"] == "sm80":  # whose backward pass visits all blocks
        return
    row = row_of(config.backward, case, options, sparse=True)
    gradients = kernels.backward(row, q, k, v, out, dout, lse, None, options, num_sms=1, heads_per_tile=2)
    check_gradients(gradients, dout, None, q, k, v, **options.reference(q, k))


LENGTHS_Q, LENGTHS_K = (100, 0, 30, 5), (150, 20, 40, 0)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case, page, page_size, window, sinks",
    [
        (SM80 | {"d": 64}, 0, 0, CAUSAL, torch.tensor([-torch.inf, -3.0])),
        (SM80 | {"d": 64}, 1, 20, WINDOW, None),
        (SM90 | {"d": 64}, 0, 0, WINDOW, None),
        (SM90 | {"d": 128}, 8, 24, CAUSAL, torch.tensor([50.0, -1e4])),
    ],
)
def test_ragged_forward(case: dict, page: int, page_size: int, window: tuple, sinks: Tensor | None) -> None:
    """Packed queries; packed keys, or pages. Rows and pages of nobody hold NaN."""
    options = Options(window=window, sinks=sinks)
    cu_q, cu_k = (integers(0, *torch.tensor(x).cumsum(0)) for x in (LENGTHS_Q, LENGTHS_K))
    q, k, v = dense(case, sq=int(cu_q[-1]) + 7, sk=int(cu_k[-1]))
    row = row_of(config.forward, case, options, ragged=True, page=page, sinks=sinks is not None)
    batch = {"batch": len(LENGTHS_Q), "longest": max(LENGTHS_Q)}
    if page:
        table = page_table(LENGTHS_K, page_size)
        stored = [to_pages(x, cu_k, table, page_size) for x in (k, v)]
        layout = {"seqused_k": integers(*LENGTHS_K), "block_table": table}
    else:
        stored, layout = [k, v], {"cu_seqlens_k": cu_k}
    sequences = kernels.ragged(cu_seqlens_q=cu_q, **layout, **batch)
    out, lse = kernels.forward(row, q, *stored, options, sequences)
    for b, (rows, keys) in enumerate(zip(spans(cu_q), spans(cu_k), strict=True)):
        parts = q[:, rows], k[:, keys], v[:, keys]
        if parts[0].numel():
            check_forward(out[:, rows], lse[:, :, rows], *parts, **options.reference(*parts[:2], b))
    assert not out[:, -7:].any() and (lse[:, :, -7:] == -torch.inf).all()  # rows of no sequence


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [SM80 | {"d": 64}, SM90 | {"d": 64}])
@pytest.mark.parametrize("window", [CAUSAL, (None, None)])
def test_a_sequence_is_as_alone(case: dict, window: tuple) -> None:
    """Bit for bit, beside others whose scores, in rows of the same warps, grow a hundred times as fast.

    Its own grow too, in blocks that need no mask: by more than makes a row renew its offset, and by less than
    makes a warpgroup compute a block again.
    """
    lengths_q, lengths_k = (100, 24, 20), (600, 570, 590)
    cu_q, cu_k = (integers(0, *torch.tensor(x).cumsum(0)) for x in (lengths_q, lengths_k))
    q, k, v = dense(case, sq=int(cu_q[-1]), sk=int(cu_k[-1]))
    q[:, 100:] *= 100
    k[:, :300] *= 4
    options = Options(window=window)
    row = row_of(config.forward, case, options, ragged=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
        batch = {"batch": len(cu_q) - 1, "longest": max(lengths_q)}
        sequences = kernels.ragged(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **batch)
        return kernels.forward(row, q, k, v, options, sequences)

    out, lse = attend(q, k, v, cu_q, cu_k)
    for rows, keys in zip(spans(cu_q)[:2], spans(cu_k)[:2], strict=True):
        alone = (integers(0, x.stop - x.start) for x in (rows, keys))
        out_alone, lse_alone = attend(q[:, rows], k[:, keys], v[:, keys], *alone)
        assert torch.equal(out[:, rows], out_alone) and torch.equal(lse[:, :, rows], lse_alone)


def attended(
    q: Tensor, k: Tensor, v: Tensor, parts: list[tuple[slice, slice, dict]]
) -> tuple[Tensor, Tensor]:
    """out and lse by the formula. parts: rows of q, the keys that they see, options of the reference."""
    out, lse = torch.zeros_like(q), torch.full((1, q.shape[2], q.shape[1]), -torch.inf)
    for rows, keys, options in parts:
        part = attention(q[:, rows], k[:, keys], v[:, keys], **options, dtype=torch.float32)
        out[:, rows], lse[:, :, rows] = part[0].to(q.dtype), part[1]
    return out, lse


def spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]


def page_table(lengths: tuple[int, ...], page_size: int) -> Tensor:
    """(batch, pages), in random order; where a sequence has no more pages, a number that no page has."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1)[: sum(counts)].tolist()
    rows = [[order.pop() for _ in range(count)] + [10**6] * (max(counts) - count) for count in counts]
    return torch.tensor(rows, dtype=torch.int32)


def to_pages(x: Tensor, cu_seqlens: Tensor, table: Tensor, page_size: int) -> Tensor:
    """Packed (1, total, h, d) -> (pages, page_size, h, d)."""
    used = table[table < 10**6]
    pages = torch.full((int(used.max()) + 1, page_size, *x.shape[2:]), float("nan"), dtype=x.dtype)
    for b, span in enumerate(spans(cu_seqlens)):
        for i, row in enumerate(x[0, span]):
            pages[table[b, i // page_size], i % page_size] = row
    return pages


BACKWARD = {
    "sm80": (SM80 | {"d": 64}, {"window": CAUSAL}, {}),
    "sm80-dropout": (SM80_ON_SM90 | {"d": 128}, {"dropout": DROPOUT}, {}),
    "sm80-sinks": (SM80 | {"d": 64}, {"window": WINDOW, "sinks": SINKS}, {}),
    "sm90": (SM90 | {"d": 64}, {"window": CAUSAL}, {}),
    "sm90-sinks": (SM90 | {"d": 64}, {"window": CAUSAL, "sinks": SINKS}, {}),
    "sm90-dropout": (SM90 | {"d": 128}, {"window": WINDOW, "dropout": DROPOUT}, {}),
    "sm90-wide": (SM90 | {"d": 256, "dtype": torch.float16}, {"window": CAUSAL}, {"deterministic": True}),
    "sm90-scores": (
        SM90 | {"d": 128},
        {"window": CAUSAL, "softcap": 5.0, "slopes": torch.tensor([[0.5, 0.25]])},
        {},
    ),
    "sm80-functions": (SM80 | {"d": 64}, {"window": CAUSAL} | functions("awkward", 1, 2, 200), {}),
    "sm90-functions": (SM90 | {"d": 64}, functions("awkward", 1, 2, 200), {}),
    "sm80-temperature": (SM80 | {"d": 64}, functions("logit_temperature", 1, 2, 200), {}),
    "sm90-temperature": (SM90 | {"d": 128}, functions("logit_temperature", 1, 2, 200), {}),
    # Derivatives of either sign, with dropout
    "sm80-functions-dropout": (SM80 | {"d": 64}, {"dropout": DROPOUT} | functions("awkward", 1, 2, 200), {}),
    "sm90-functions-dropout": (SM90 | {"d": 64}, {"dropout": DROPOUT} | functions("awkward", 1, 2, 200), {}),
    "sm90-softcap-dropout": (
        SM90 | {"d": 128, "dtype": torch.float16},
        {"window": CAUSAL, "dropout": DROPOUT, "softcap": 5.0},
        {},
    ),
    "sm90-wide-late": (
        SM90 | {"d": 192},
        functions("late", 1, 2, 200) | functions("relative_bias", 1, 2, 200),
        {},
    ),
}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    case, changes, features = BACKWARD[name]
    options = Options(**changes)
    q, k, v = dense(case, sq=140, sk=200 if options.sinks is None else 60)  # with sinks: rows without keys
    out, lse = attention(q, k, v, **options.reference(q, k), dtype=torch.float32)
    out, dout, dlse = out.to(q.dtype), random(*out.shape, dtype=q.dtype), torch.randn_like(lse)
    row = row_of(config.backward, case, options, **features)
    per = (
        2 if name in ("sm80", "sm90-scores") else 1
    )  # all query heads of the key head, or thread blocks share them
    gradients = kernels.backward(row, q, k, v, out, dout, lse, dlse, options, num_sms=1, heads_per_tile=per)
    check_gradients(gradients, dout, dlse, q, k, v, **options.reference(q, k))


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case, options, features",
    [
        (
            SM80 | {"d": 64, "dtype": torch.float16},
            Options(WINDOW, softcap=5.0, slopes=torch.tensor([[0.5, 0.25]] * 4)),
            {"deterministic": True},
        ),
        (SM90 | {"d": 96}, Options(CAUSAL), {"deterministic": True}),
        (SM90 | {"d": 128}, Options(**functions("awkward", 4, 2, 150)), {}),
    ],
    ids=("sm80", "sm90", "sm90-functions"),
)
def test_ragged_backward(case: dict, options: Options, features: dict) -> None:
    cu_q, cu_k = (integers(0, *torch.tensor(x).cumsum(0)) for x in (LENGTHS_Q, LENGTHS_K))
    q, k, v = dense(case, sq=int(cu_q[-1]), sk=int(cu_k[-1]))
    parts = [
        (rows, keys, options.reference(q[:, rows], k[:, keys], b))
        for b, (rows, keys) in enumerate(zip(spans(cu_q), spans(cu_k), strict=True))
        if q[:, rows].numel()
    ]
    out, lse = attended(q, k, v, parts)
    dout = random(*out.shape, dtype=q.dtype)
    row = row_of(config.backward, case, options, ragged=True, **features)
    sequences = kernels.ragged(
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, batch=len(LENGTHS_Q), longest=max(LENGTHS_Q)
    )
    dq, dk, dv = kernels.backward(row, q, k, v, out, dout, lse, None, options, sequences)
    for rows, keys, reference in parts:
        gradients = dq[:, rows], dk[:, keys], dv[:, keys]
        check_gradients(gradients, dout[:, rows], None, q[:, rows], k[:, keys], v[:, keys], **reference)
    assert not dk[:, spans(cu_k)[1]].any()  # keys that no query sees


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "arch, tokens, heads, page_size, merges, options",
    [
        # one split; three, merged by the last of their thread blocks, or by the combine kernel
        ("sm_80", 1, 4, 16, ((1, False), (3, True), (3, False)), Options()),
        ("sm_90a", 5, 8, 0, ((2, False),), Options(WINDOW, softcap=5.0, slopes=torch.rand(3, 8))),
        ("sm_80", 5, 8, 0, ((2, False),), Options(**functions("awkward", 3, 8, 300))),
        (
            "sm_90a",
            1,
            4,
            0,
            ((1, False), (3, True), (3, False)),
            Options(CAUSAL, sinks=torch.tensor([0.5, 50.0, -torch.inf, 3.0])),
        ),
    ],
    ids=("paged", "scores", "functions", "sinks"),
)
def test_decode(arch: str, tokens: int, heads: int, page_size: int, merges: tuple, options: Options) -> None:
    """A sequence without keys among others, some with fewer blocks of keys than splits."""
    lengths, heads_k = (300, 20, 0), 2
    q = random(3, tokens, heads, 64)
    k, v = (random(3, 300, heads_k, 64) for _ in range(2))
    features = options.score, int(page_size > 0), options.sinks is not None
    row = config.decode(arch, "bfloat16", 64, tokens * heads // heads_k, *features)
    stored, table = [k, v], None
    if page_size:
        table, cu_k = page_table(lengths, page_size), integers(0, *torch.tensor(lengths).cumsum(0))
        packed = (torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None] for x in (k, v))
        stored = [to_pages(x, cu_k, table, page_size) for x in packed]
    sequences = kernels.ragged(
        seqused_k=integers(*lengths), block_table=table, batch=3, longest=tokens, keys=300
    )
    for splits, fused in merges:
        out, lse = kernels.decode(row, q, *stored, options, sequences, splits, fused)
        for b, n in enumerate(lengths):
            parts = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
            check_forward(out[b : b + 1], lse[b : b + 1], *parts, **options.reference(*parts[:2], b))


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(12))
def test_random_functions(seed: int) -> None:
    """What their operations are in a kernel; what they are on the CPU is tested in test_scores.py."""
    made = random_functions(seed, 2, 2, 64)
    check_decode_with(made.functions, made.oracle)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_index_out_of_range_reads_the_last_element() -> None:
    """Nothing outside of the table, in which a difference of indices may not lie."""
    table = torch.arange(5.0)
    last = torch.arange(-64, 64)
    last = table[torch.where((last < 0) | (last > 4), 4, last)].double()
    given, oracle = (lambda s, b, h, i, j: s + table[i - j]), (lambda s, b, h, i, j: s + last[i - j + 64])
    check_decode_with({"score_mod": given}, {"score_mod": oracle})


def check_decode_with(given: dict, oracle: dict) -> None:
    """In the smallest kernel."""
    options, lengths = Options(**given), (40, 25)
    q = random(2, 2, 2, 64)
    k, v = (random(2, 40, 2, 64) for _ in range(2))
    row = config.decode("sm_80", "bfloat16", 64, 2, options.score)
    sequences = kernels.ragged(seqused_k=integers(*lengths), batch=2, longest=2, keys=40)
    out, lse = kernels.decode(row, q, k, v, options, sequences, 1, False)
    torch.set_default_dtype(torch.float64)  # what the oracle makes of integers
    try:
        for b, n in enumerate(lengths):
            parts = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
            expected, expected_lse = attention(*parts, **oracle, first=b, dtype=torch.float64)
            assert_lse(lse[b : b + 1], expected_lse)
            torch.testing.assert_close(out[b : b + 1].double(), expected, atol=0.02, rtol=0.01)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rotary, page_size", [("none", 16), ("halves", 0), ("interleaved", 16)])
def test_append(rotary: str, page_size: int) -> None:
    """3 new tokens behind 20, 7 and no keys, of which the pages, or the capacity, hold 22."""
    before, new, capacity, d, rotary_dim = (20, 7, 0), 3, 22, 64, 32
    dtype = torch.bfloat16
    q, k_new, v_new = random(3, new, 4, d), random(3, new, 2, d), random(3, new, 2, d)
    k, v = (random(3, capacity, 2, d) for _ in range(2))
    angle = torch.rand(capacity + new, rotary_dim // 2) * 6
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    stored, table = [k, v], None
    if page_size:
        order = integers(3, 0, 5, 1, 4, 2).reshape(3, 2)
        table, stored = order, [torch.full((6, page_size, 2, d), torch.nan, dtype=dtype) for _ in (k, v)]
    sequences = kernels.ragged(
        seqused_k=integers(*before), block_table=table, batch=3, longest=new, keys=capacity
    )
    row = config.KvAppend("sm_90a", "bfloat16", rotary, int(page_size > 0))
    rotated = () if rotary == "none" else (q, tables)
    was = [x.clone() for x in stored]
    q_out = kernels.append(row, k_new, v_new, *stored, sequences, *rotated)
    places = [(b, i) for b in range(3) for i in range(new)]
    for now, x, turned in zip(stored, (k_new, v_new), (rotary != "none", False), strict=True):
        for b, i in places:
            token = before[b] + i
            expected = turn(x[b, i], *tables, token, rotary) if turned else x[b, i]
            if page_size:
                got = now[table[b, token // page_size], token % page_size]
            elif token < capacity:
                got = now[b, token]
            else:
                continue
            torch.testing.assert_close(got, expected, atol=0.02, rtol=0.01)
    written = [
        int((a.nan_to_num(7) != b.nan_to_num(7)).any(-1).any(-1).sum())
        for a, b in zip(stored, was, strict=True)
    ]
    assert max(written) <= len(places)
    if rotated:
        expected = torch.stack([turn(q[b, i], *tables, before[b] + i, rotary) for b, i in places])
        torch.testing.assert_close(q_out.flatten(0, 1), expected, atol=0.02, rtol=0.01)


def turn(x: Tensor, cos: Tensor, sin: Tensor, position: int, rotary: str) -> Tensor:
    """(h, d), rotated: rotary embedding as its paper has it, in float32."""
    half, y = cos.shape[1], x.float()
    cos, sin = cos[position].float(), sin[position].float()
    if rotary == "halves":
        a, b = y[:, :half].clone(), y[:, half : 2 * half].clone()
        y[:, :half], y[:, half : 2 * half] = a * cos - b * sin, a * sin + b * cos
    else:
        a, b = y[:, : 2 * half : 2].clone(), y[:, 1 : 2 * half : 2].clone()
        y[:, : 2 * half : 2], y[:, 1 : 2 * half : 2] = a * cos - b * sin, a * sin + b * cos
    return y.to(x.dtype)


# The kernels without one of their barriers or waits


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case, window, needed",
    [
        (SM80 | {"d": 64}, CAUSAL, (("bar", "sync"), ("cp", "async", "wait_group"))),
        (
            SM90 | {"d": 128},
            (None, None),
            (("bar", "sync", "0"), ("fence", "proxy"), ("cp", "async", "bulk", "wait_group")),
        ),
    ],
    ids=("sm80", "sm90"),
)
def test_each_wait_is_needed(case: dict, window: tuple, needed: tuple[tuple[str, ...], ...]) -> None:
    """Whichever is taken out of a forward kernel, there is a fault."""
    options = Options(window)
    q, k, v = dense(case, sq=200, sk=270)
    row = row_of(config.forward, case, options)
    library = kernels.library(row)
    (kernel,) = library.kernels.values()
    places = [i for i, instruction in enumerate(kernel.instructions) if starts_with(instruction, needed)]
    assert len(places) >= 4
    try:
        for place in places:
            library.kernels[kernel.name] = without(kernel, place)
            with pytest.raises(Fault):
                kernels.forward(row, q, k, v, options, num_sms=1)
    finally:
        library.kernels[kernel.name] = kernel


def starts_with(instruction: ptx.Instruction, starts: tuple[tuple[str, ...], ...]) -> bool:
    words = (*instruction.opcode, *instruction.text.split()[1:])
    return any(words[: len(start)] == start for start in starts)


def without(kernel: ptx.Kernel, place: int) -> ptx.Kernel:
    """The kernel with an instruction in this place that does nothing."""
    instructions = list(kernel.instructions)
    nothing = instructions[place]._replace(opcode=("prefetch",), operands=())
    instructions[place] = nothing
    return dataclasses.replace(kernel, instructions=instructions)
