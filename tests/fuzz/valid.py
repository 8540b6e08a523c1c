"""Random valid calls of every public function."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from tests.fuzz.call import Call
from tests.fuzz.draft import SCORES, Draft

INT_MAX = 2**31 - 1
# A kernel is compiled for each kind of call, so on a GPU so many calls in a row are of one kind.
OF_A_KIND = {"cpu": 1, "cuda": 100}


def valid(seed: int, number: int, device: str, paths: Sequence[str]) -> Call:
    """The call of this number. paths: what MINI_FLASH_ATTENTION_BACKEND may be, "" for nothing."""
    kind = Random(f"{seed}/{number // OF_A_KIND[device]}")
    draft = Draft(kind, Random(f"{seed}:{number}"), device)
    path, write = kind.choice(paths), kind.choices(tuple(WRITERS), WRITERS.values())[0]
    write(draft)
    environment = {"MINI_FLASH_ATTENTION_BACKEND": path} if path else {}
    return Call(draft.function, device, number, draft.tensors, draft.numbers, draft.gradients, environment)


def dense(draft: Draft) -> None:
    """flash_attn_func and its packed variants."""
    packed = draft.kind.choice(("", "", "qkv", "kv"))
    draft.function = f"flash_attn_{packed}packed_func" if packed else "flash_attn_func"
    batch = draft.random.choice((0, 1, 1, 2, 2, 3, 5))
    (queries,), (keys,) = draft.lengths(1)
    if packed == "qkv":
        draft.heads_k, keys = draft.heads, queries
    while batch * queries * keys * draft.heads > SCORES[draft.device]:
        batch, queries, keys = max(batch // 2, 1), queries * 2 // 3, keys * 2 // 3
    if packed == "qkv":
        keys = queries
        (grad,) = draft.grads(1)
        draft.floats("qkv", draft.shape(batch, queries, 3), grad=grad)
    else:
        grads = draft.grads(2 if packed else 3)
        draft.floats("q", draft.shape(batch, queries), grad=grads[0])
        two = (2,) if packed else ()
        for name, grad in zip(("kv",) if packed else ("k", "v"), grads[1:], strict=True):
            draft.floats(name, draft.shape(batch, keys, *two, heads=draft.heads_k), grad=grad)
    draft.options(batch)
    draft.gradient(draft.shape(batch, queries), (batch, draft.heads, queries))


def varlen(draft: Draft) -> None:
    """flash_attn_varlen_func in its three forms, and its packed variants."""
    form = draft.kind.choice(("packed", "packed", "rows", "pages", "qkv", "kv"))
    variant = f"{form}packed_" if form in ("qkv", "kv") else ""
    draft.function = f"flash_attn_varlen_{variant}func"
    batch = draft.random.choice((0, 1, 1, 2, 3, 4))
    queries, keys = draft.lengths(batch)
    if form == "qkv":
        draft.heads_k, keys = draft.heads, queries
    with_out = form not in ("qkv", "kv") and draft.kind.random() < 0.2
    if with_out or form == "pages":
        draft.backward = False
    total = sum(queries) + (draft.random.choice((1, 5)) if draft.maybe(0.3) else 0)
    every = [f":{sum(queries)}"]
    starts = [sum(queries[:b]) for b in range(batch + 1)]
    if form == "qkv":
        draft.floats("qkv", draft.shape(total, 3), every, grad=draft.grads(1)[0])
        draft.ints("cu_seqlens", starts)
        draft.numbers["max_seqlen"] = longest(draft, queries)
    else:
        grads = draft.grads(2 if form == "kv" else 3)
        draft.floats("q", draft.shape(total), every, grad=grads[0])
        draft.ints("cu_seqlens_q", starts)
        room = VARLEN_KEYS[form](draft, keys, grads[1:])
        draft.numbers |= {"max_seqlen_q": longest(draft, queries), "max_seqlen_k": longest(draft, room)}
    if with_out:
        draft.floats("out", draft.shape(total), written=True)
    if form not in ("qkv", "kv") and draft.maybe(0.3):
        draft.numbers["num_splits"] = str(draft.random.choice((0, 1, 2, 5, 128)))
    draft.options(batch)
    draft.gradient(draft.shape(total), (draft.heads, total), f":{sum(queries)}")


def longest(draft: Draft, lengths: Sequence[int]) -> str:
    """A max_seqlen, the exact one or a larger one."""
    most = max(lengths, default=0) + (draft.random.choice((0, 1, 100)) if draft.maybe(0.3) else 0)
    return f"torch.tensor({most})" if draft.maybe(0.1) else str(most)


def packed_keys(draft: Draft, keys: list[int], grads: list[bool]) -> list[int]:
    """Packed keys; with seqused_k only the first ones of each sequence count. Returns the room of each."""
    room = [n + (draft.random.choice((0, 1, 7)) if draft.maybe(0.3) else 0) for n in keys]
    some_unused = room != keys or draft.maybe(0.2)
    starts = [sum(room[:b]) for b in range(len(keys) + 1)]
    total = starts[-1] + (draft.random.choice((1, 5)) if draft.maybe(0.3) else 0)
    filled = [f"{start}:{start + n}" for start, n in zip(starts, keys, strict=False)] or [":0"]
    names, two = ("k", "v"), ()
    if draft.function.endswith("kvpacked_func"):  # it takes no seqused_k
        names, two, filled, some_unused = ("kv",), (2,), [f":{starts[-1]}"], False
    for name, grad in zip(names, grads, strict=True):
        draft.floats(name, draft.shape(total, *two, heads=draft.heads_k), filled, grad=grad)
    draft.ints("cu_seqlens_k", starts)
    if some_unused:
        draft.ints("seqused_k", keys)
    return room


def rows_of_keys(draft: Draft, keys: list[int], grads: list[bool]) -> list[int]:
    """A row of storage a sequence."""
    capacity = max(keys, default=0) + draft.random.choice((0, 0, 1, 9))
    filled = [f"{b}, :{n}" for b, n in enumerate(keys)] or [":0"]
    for name, grad in zip("kv", grads, strict=True):
        draft.floats(name, draft.shape(len(keys), capacity, heads=draft.heads_k), filled, grad=grad)
    draft.numbers["cu_seqlens_k"] = "None"
    draft.ints("seqused_k", keys)
    return keys


def pages_of_keys(draft: Draft, keys: list[int], grads: list[bool]) -> list[int]:
    """Pages, with the lengths in cu_seqlens_k or in seqused_k."""
    pages = draw_pages(draft, keys, max(keys, default=0), more=draft.random.choice((0, 0, 1)))
    filled = [place for b, n in enumerate(keys) for place in places(pages, b, 0, n)]
    for name in "kv":
        draft.floats(name, draft.shape(pages.count, pages.size, heads=draft.heads_k), filled)
    draft.tensors["block_table"] = pages.table
    by_starts = draft.maybe(0.5)
    if by_starts:
        draft.ints("cu_seqlens_k", [sum(keys[:b]) for b in range(len(keys) + 1)])
    else:
        draft.numbers["cu_seqlens_k"] = "None"
    if not by_starts or draft.maybe(0.3):
        draft.ints("seqused_k", keys)
    return keys


VARLEN_KEYS = {"packed": packed_keys, "kv": packed_keys, "rows": rows_of_keys, "pages": pages_of_keys}


class Pages(NamedTuple):
    """A paged storage."""

    size: int  # tokens of a page
    count: int
    rows: list[list[int]]  # the pages of each row
    columns: int

    @property
    def table(self) -> str:
        """The code of the table; entries behind a row's last page exist nowhere."""
        nowhere = (INT_MAX, -1)
        rows = [row + [nowhere[i % 2]] * (self.columns - len(row)) for i, row in enumerate(self.rows)]
        return f"block_table = torch.tensor({rows}, dtype=torch.int32).view{len(rows), self.columns}"


def draw_pages(draft: Draft, ends: list[int], capacity: int, more: int) -> Pages:
    """Pages in any order for rows of so many tokens, some free ones, and `more` columns than it takes."""
    size = draft.kind.choice((1, 3, 16, 64, 256))
    used = [-(-end // size) for end in ends]
    count = sum(used) + draft.random.choice((1, 1, 4))
    free = draft.random.sample(range(count), count)
    return Pages(size, count, [[free.pop() for _ in range(n)] for n in used], -(-capacity // size) + more)


def places(pages: Pages | None, row: int, start: int, end: int) -> list[str]:
    """Where tokens start to end of a row are in its storage, as indices."""
    if pages is None:
        return [f"{row}, {start}:{end}"]
    found = []
    for i, page in enumerate(pages.rows[row]):
        first, last = max(start - i * pages.size, 0), min(end - i * pages.size, pages.size)
        if first < last:
            found.append(f"{page}, {first}:{last}")
    return found


def kvcache(draft: Draft) -> None:
    """flash_attn_with_kvcache: rows or pages, with an append and a rotation or without."""
    draft.function = "flash_attn_with_kvcache"
    kind, random = draft.kind, draft.random
    paged, appends, rotates = kind.random() < 0.4, kind.random() < 0.6, kind.random() < 0.5
    batch = random.choice((0, 1, 1, 2, 3, 4))
    queries = kind.choice((1, 1, 1, 2, 5, 17, 130, draft.length(300)))
    queries = min(queries, SCORES[draft.device] // (320 * max(1, batch) * draft.heads))
    added = random.choice((queries, 0, 1, 3, 20)) if appends else 0
    capacity = added + draft.length(300)
    whole = not appends and not paged and draft.maybe(0.2)  # no cache_seqlens
    one_number = not whole and draft.maybe(0.3)
    before = [capacity if whole else random.randint(0, capacity - added) for _ in range(batch)]
    number = random.randint(0, capacity - added)
    if one_number:
        before = [number] * batch
    starts = [random.randint(0, n + added) for n in before] if kind.random() < 0.3 else [0] * batch
    rows = batch + random.choice((0, 0, 1, 3))
    storage = random.sample(range(rows), batch) if draft.maybe(0.3) else list(range(batch))

    ends = [0] * rows
    for row, n in zip(storage, before, strict=True):
        ends[row] = n + added
    pages = draw_pages(draft, ends, capacity, random.choice((0, 0, 1))) if paged else None
    filled = [place for one in zip(storage, starts, before, strict=True) for place in places(pages, *one)]
    sizes = (pages.count, pages.size) if pages else (rows, capacity)
    draft.floats("q", draft.shape(batch, queries))
    draft.caches(draft.shape(*sizes, heads=draft.heads_k), filled or [":0"], written=appends)
    if appends:
        for name in "kv":
            draft.floats(name, draft.shape(batch, added, heads=draft.heads_k))
    draft.options(batch, cache=True)
    if pages:
        draft.tensors["block_table"] = pages.table
    if one_number:
        draft.numbers["cache_seqlens"] = str(number)
    elif not whole:
        draft.ints("cache_seqlens", before)
    if storage != list(range(batch)):
        draft.ints("cache_batch_idx", storage)
    if any(starts):
        draft.ints("cache_leftpad", starts)
    if appends and rotates and draft.head_dim >= 16:
        rotary(draft, max([*before, number]) + max(added, queries, 1))


def rotary(draft: Draft, rows: int) -> None:
    """Quarter turns, which are exact in every precision."""
    rotary_dim = 16 * draft.random.randint(1, draft.head_dim // 16)
    rows += draft.random.choice((0, 1, 100))
    draft.tensors["rotary_cos"] = (
        f"turns = torch.randint(4, ({rows}, {rotary_dim // 2}))\n"
        f"rotary_cos = torch.tensor([1, 0, -1, 0], dtype=torch.{draft.dtype})[turns]"
    )
    draft.tensors["rotary_sin"] = (
        f"rotary_sin = torch.tensor([0, 1, 0, -1], dtype=torch.{draft.dtype})[turns]"
    )
    draft.numbers["rotary_interleaved"] = draft.random.choice(("True", "False"))


MASKS = ("bool", "uint8", "int32", "int64", "float32", "bfloat16")


def padding(draft: Draft) -> None:
    """pad_input and unpad_input."""
    random = draft.random
    batch, seqlen = random.choice((0, 1, 2, 5)), draft.length(30)
    inner = random.choice(((), (3,), (2, 8)))
    if draft.maybe(0.5):
        draft.function = "unpad_input"
        draft.floats("hidden_states", (batch, seqlen, *inner), grad=draft.maybe(0.5))
        for name, share in (("attention_mask", 0.7), ("unused_mask", 0.2)):
            if name == "attention_mask" or draft.maybe(0.5):
                mask = f"torch.rand({batch}, {seqlen}) < {share}"
                draft.tensors[name] = f"{name} = ({mask}).to(torch.{random.choice(MASKS)})"
        return
    draft.function = "pad_input"
    everywhere = range(batch * seqlen)
    chosen = random.sample(everywhere, random.randint(0, len(everywhere)))
    draft.floats("hidden_states", (len(chosen), *inner), grad=draft.maybe(0.5))
    dtype = random.choice(("int32", "int64", "bool"))
    if dtype == "bool":
        values = [place in chosen for place in everywhere]
    else:  # counted from the end, some of them
        values = [place - len(everywhere) if draft.maybe(0.1) else place for place in chosen]
    draft.tensors["indices"] = f"indices = torch.tensor({values}, dtype=torch.{dtype})"
    draft.numbers |= {"batch": str(batch), "seqlen": str(seqlen)}


WRITERS = {dense: 3, varlen: 4, kvcache: 3, padding: 1}  # and how often each is drawn
