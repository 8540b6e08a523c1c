"""Text generation with a paged KV cache and continuous batching: `python examples/generate.py`.

A transformer that generates keeps the keys and values of all earlier tokens: the KV cache. Texts grow
at different speeds to lengths that nobody knows beforehand, so a contiguous piece of memory for the
longest possible text of each request would mostly lie idle. Paging cuts the cache into pages of a few
tokens, as an operating system does: a request takes a page when its last one is full, any page, and
its row of the *block table* says which ones it has, in order. Token t of request r is row
t % PAGE_SIZE of page block_table[r, t // PAGE_SIZE].

Continuous batching: as soon as a request is done its pages are free and the next request joins, while
the others go on. One call of flash_attn_with_kvcache a layer does all of it: it rotates queries and keys
(RoPE), writes the new keys and values into their pages, and attends to each request's own pages.

The weights are random, so the text means nothing; but every token is checked against a recomputation
without any cache, by softmax(QKᵀ)V as the formula says it. Runs on a CPU (fp32) and a GPU (bf16).
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_flash_attention import flash_attn_with_kvcache

LAYERS, DIM, HEADS, HEADS_K, HEAD_DIM, VOCABULARY = 4, 256, 8, 2, 64, 1024
PAGE_SIZE = 16  # tokens
LONGEST = 256  # tokens of a prompt and its answer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out


class Block(nn.Module):
    """A layer of the transformer: attention, then two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, (HEADS + 2 * HEADS_K) * HEAD_DIM, bias=False)
        self.project = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        qkv = self.qkv(F.rms_norm(x, (DIM,))).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, HEADS_K, HEADS_K), dim=2)
        x = x + self.project(attend(layer, q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (DIM,)))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        for weight in self.parameters():  # large enough for each token to depend on those before it
            nn.init.normal_(weight, std=2 * weight.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Logits (batch, seqlen, VOCABULARY) of tokens (batch, seqlen); `attend` is the attention to use."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        return self.head(F.rms_norm(x, (DIM,))).float()


def rotary_tables() -> tuple[Tensor, Tensor]:
    """cos and sin (LONGEST, HEAD_DIM / 2) of each position's rotations."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
    angles = torch.outer(torch.arange(LONGEST), frequencies)
    return angles.cos().to(DEVICE, DTYPE), angles.sin().to(DEVICE, DTYPE)


@dataclass
class Request:
    name: int
    tokens: list[int]  # the prompt, then what was generated
    prompt: int  # how many of them are the prompt
    total: int  # how many there will be: two more than the prompt, or many more
    pages: list[int] = field(default_factory=list)


class PagedCache:
    """Keys and values of all layers, and which pages are free."""

    def __init__(self, pages: int) -> None:
        shape = (LAYERS, pages, PAGE_SIZE, HEADS_K, HEAD_DIM)
        self.k, self.v = (torch.empty(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.cos, self.sin = rotary_tables()
        self.free = list(range(pages))

    def grow(self, request: Request) -> None:
        """Gives the request the pages that its tokens need."""
        while len(request.pages) * PAGE_SIZE < len(request.tokens):
            request.pages.append(self.free.pop())

    def release(self, request: Request) -> None:
        self.free += request.pages
        request.pages = []

    def attend(self, requests: list[Request], new: int) -> Attend:
        """Attention of the last `new` tokens of each request, whose keys and values are stored on the way."""
        columns = max(len(request.pages) for request in requests)
        # Rows are filled up with a page that does not exist: nothing beyond a length is ever read.
        rows = [request.pages + [-1] * (columns - len(request.pages)) for request in requests]
        block_table = torch.tensor(rows, device=DEVICE, dtype=torch.int32)
        lengths = [len(request.tokens) - new for request in requests]  # what is stored by now
        cache_seqlens = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_with_kvcache(
                q,
                self.k[layer],
                self.v[layer],
                k,
                v,
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                rotary_interleaved=False,
                cache_seqlens=cache_seqlens,
                block_table=block_table,
                causal=True,
            )

        return attention


def advance(model: Transformer, cache: PagedCache, requests: list[Request], new: int) -> None:
    """Runs the last `new` tokens of each request, the same number for all, and appends the likeliest next."""
    for request in requests:
        cache.grow(request)
    tokens = torch.tensor([request.tokens[-new:] for request in requests], device=DEVICE)
    logits = model(tokens, cache.attend(requests, new))
    for request, token in zip(requests, logits[:, -1].argmax(-1).tolist(), strict=True):
        request.tokens.append(token)


def serve(model: Transformer, cache: PagedCache, waiting: deque[Request], batch: int) -> list[Request]:
    """Continuous batching: all requests, in the order in which they are done."""
    running, done = [], []
    pages = len(cache.free)
    while waiting or running:
        # Whoever joins must be able to finish. Real servers are bolder, and evict if it goes wrong.
        while waiting and len(running) < batch and pages >= sum(map(pages_for, [*running, waiting[0]])):
            request = waiting.popleft()
            advance(model, cache, [request], new=request.prompt)  # prefill: the prompt in one go
            running.append(request)
            report(f"request {request.name} joins", running, cache)
        advance(model, cache, running, new=1)  # decoding: one token of everybody
        for request in [request for request in running if len(request.tokens) == request.total]:
            running.remove(request)
            cache.release(request)
            done.append(request)
            report(f"request {request.name} is done", running, cache)
    return done


def pages_for(request: Request) -> int:
    return -(-request.total // PAGE_SIZE)


def report(event: str, running: list[Request], cache: PagedCache) -> None:
    used = sum(len(request.pages) for request in running)
    tokens = sum(len(request.tokens) for request in running)
    state = f"{len(running):3d} running, {tokens:5d} tokens in {used:4d} pages, {len(cache.free):4d} free"
    print(f"  {event:20s} {state}")


def check(model: Transformer, request: Request) -> float:
    """How far the logit of a generated token is from the largest one, at most, if nothing is cached."""
    tokens = torch.tensor([request.tokens], device=DEVICE)
    logits = model(tokens[:, :-1], plain_attention)[0, request.prompt - 1 :]
    chosen = logits.gather(1, tokens[0, request.prompt :, None])[:, 0]
    return (logits.amax(-1) - chosen).max().item()


def plain_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ)V of whole texts (batch, seqlen, heads, HEAD_DIM), causal, in PyTorch operations."""
    cos, sin = (table[: q.shape[1], None] for table in rotary_tables())
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(HEADS // HEADS_K, dim=1) for tensor in (k, v))
    scores = q @ k.mT / HEAD_DIM**0.5
    later = torch.ones(scores.shape[-2:], device=DEVICE, dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2).to(DTYPE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension i and i + HEAD_DIM / 2 are the two coordinates that are rotated."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """0 if every token is the one that full recomputation gives."""
    parser = argparse.ArgumentParser(
        description="Generation with a paged KV cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=int, default=12, help="texts to generate, %(default)s")
    add("--batch", type=int, default=6, help="requests that run at a time, at most %(default)s")
    add("--pages", type=int, default=48, help=f"of {PAGE_SIZE} tokens, %(default)s shared by all")
    add("--longest", type=int, default=LONGEST, help="tokens of a prompt and its answer, at most %(default)s")
    args = parser.parse_args(arguments)
    for name in ("requests", "batch", "pages"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if not 16 <= args.longest <= LONGEST:
        parser.error(f"--longest must be 16 to {LONGEST}, not {args.longest}")
    room = args.pages * PAGE_SIZE
    if args.longest > room:
        parser.error(
            f"--longest is {args.longest} tokens, but --pages {args.pages} have room for {room} alone"
        )

    torch.manual_seed(0)
    model = Transformer().to(DEVICE, DTYPE)
    cache = PagedCache(args.pages)
    waiting = deque(make_requests(args.requests, args.longest))
    print(f"{args.requests} requests on {DEVICE}, {args.pages} pages of {PAGE_SIZE} tokens")
    start = time.perf_counter()
    done = serve(model, cache, waiting, args.batch)
    seconds = time.perf_counter() - start
    generated = sum(request.total - request.prompt for request in done)
    print(f"{generated} tokens generated, {generated / seconds:.0f} tokens/s")

    # In bf16 the two ways of computing differ in the last bits, so nearly equal logits may swap places.
    allowed = 0.5 if DEVICE == "cuda" else 1e-4
    worst = max(check(model, request) for request in done)
    print("Recomputed without a cache, the logit of a generated token is nowhere more than")
    print(f"{worst:.2g} below the largest one ({allowed} is allowed)")
    return 0 if worst <= allowed and len(cache.free) == args.pages else 1


def make_requests(count: int, longest: int) -> list[Request]:
    """Random prompts and answers of random lengths."""
    requests = []
    for name in range(count):
        total = int(torch.randint(12, longest + 1, ()))
        prompt = int(torch.randint(1, total - 1, ()))
        requests.append(Request(name, torch.randint(VOCABULARY, (prompt,)).tolist(), prompt, total))
    return requests


if __name__ == "__main__":
    sys.exit(main())
