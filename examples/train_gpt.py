"""Trains a small GPT twice, with our attention and with PyTorch's: `python examples/train_gpt.py`.

The text is what ships with Python: its license and the sources of its library, byte by byte. Both runs
start from the same weights and see the same batches, so their losses must agree within noise: that is
checked. Tokens/s and peak memory are printed, and the curves drawn if matplotlib is there (`--plot`).
Without a GPU, a smaller model trains on shorter texts for about a minute.
"""

import argparse
import importlib.util
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_flash_attention import flash_attn_func

HEAD_DIM, BYTES = 64, 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Size:
    layers: int
    dim: int
    seqlen: int
    batch: int


SIZES = {"cuda": Size(6, 256, 2048, 8), "cpu": Size(2, 128, 128, 4), "tiny": Size(1, 64, 32, 2)}
# Rounding alone drives two runs apart by some thousandths of a nat a byte; a wrong gradient, by far more.
ALLOWED = 0.02

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # all (batch, seqlen, heads, HEAD_DIM)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


def pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dim: int, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, HEAD_DIM))
        x = x + self.project(self.attention(*qkv.unbind(2)).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.dim)
        self.positions = nn.Embedding(size.seqlen, size.dim)
        self.blocks = nn.Sequential(*(Block(size.dim, attention) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.dim), nn.Linear(size.dim, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, seqlen, BYTES) of the byte behind each of text (batch, seqlen)."""
        x = self.embedding(text) + self.positions.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Result(NamedTuple):
    losses: list[float]
    tokens_per_s: float
    peak_bytes: int  # of the GPU's memory; 0 on a CPU


def train(text: Tensor, size: Size, steps: int, attention: Attention) -> Result:
    """The loss of each step; the first tenth of the steps is not timed."""
    torch.manual_seed(0)
    model = GPT(size, attention).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, started = [], 0.0
    warmup = steps // 10
    for step in range(steps):
        if step == warmup:
            synchronize()
            started = time.perf_counter()
        starts = torch.randint(len(text) - size.seqlen, (size.batch,))
        chunks = torch.stack([text[start : start + size.seqlen + 1] for start in starts]).to(DEVICE).long()
        # On a GPU the linear maps, and so q, k and v, are bf16; weights and optimizer stay fp32.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            logits = model(chunks[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), chunks[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    tokens = (steps - warmup) * size.batch * size.seqlen
    return Result(torch.stack(losses).tolist(), tokens / seconds, peak)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def library_text(limit: int = 8_000_000) -> Tensor:
    """Bytes of Python's license and library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / "LICENSE.txt", *sorted(library.glob("*.py"))]
    text = b"".join(file.read_bytes() for file in files if file.exists())
    return torch.frombuffer(bytearray(text[:limit]), dtype=torch.uint8)


def apart(one: Result, other: Result) -> float:
    """How far two curves lie apart on average in the last fifth, nats a byte."""
    last = max(1, len(one.losses) // 5)
    difference = torch.tensor(one.losses[-last:]) - torch.tensor(other.losses[-last:])
    return difference.mean().abs().item()


def draw(results: dict[str, Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axis = figure.add_subplot(xlabel="step", ylabel="loss, nats a byte")
    for name, result in results.items():
        axis.plot(result.losses, label=f"{name}, {result.tokens_per_s:.0f} tokens/s")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """0 if the two attentions train alike."""
    parser = argparse.ArgumentParser(description="A small GPT, trained with two attentions.")
    add = parser.add_argument
    add("--size", choices=SIZES, default=DEVICE, help="of the model and its texts; here %(default)s")
    add("--steps", type=int, default=300, help="batches that each run sees, %(default)s")
    add("--plot", type=Path, metavar="PNG", help="draw the losses into this file (needs matplotlib)")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, not {args.steps}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.plot and (args.plot.suffix != ".png" or not args.plot.parent.is_dir()):
        parser.error(f"--plot must be a .png in a folder that exists, not {args.plot}")

    text, size, results = library_text(), SIZES[args.size], {}
    print(f"{size} on {DEVICE}, {len(text) / 1e6:.1f} MB of text, {args.steps} steps")
    attentions = {"mini_flash_attention": ours, "PyTorch": pytorchs}
    for attention in attentions.values():  # what a process does once is not timed
        train(text, size, min(20, args.steps), attention)
    for name, attention in attentions.items():
        result = results[name] = train(text, size, args.steps, attention)
        memory = f", peak memory {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
        losses = f"loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}"
        print(f"  {name:21s} {losses}, {result.tokens_per_s:.0f} tokens/s{memory}", flush=True)
    distance = apart(*results.values())
    print(f"  In the last fifth of the steps they are {distance:.5f} apart on average ({ALLOWED} is allowed)")
    if args.plot:
        draw(results, args.plot)
    return 0 if distance <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
