"""Step 2: tiles, and the online softmax (Milakov and Gimelshein 2018). No matrix of scores in memory.

A tile of queries walks over the keys block by block, and keeps for each row: the maximum score so far, the
sum of exp(score - maximum), and O, a sum of values weighted alike. When the maximum grows, what was summed
before is rescaled: exp(s - m) = exp(s - m_old) * exp(m_old - m). q, k, v: (batch, seqlen, heads, d), any
dtype, any lengths.
"""

import torch
from torch import Tensor

TILE_M = 128  # query rows of a tile
TILE_N = 128  # keys of a block


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns O, (batch, seqlen of q, heads, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seqlen, d)
    tiles = [attend(tile, k, v) for tile in q.split(TILE_M, dim=2)]
    return torch.cat(tiles, dim=2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O of one tile of queries (of every head)."""
    scale = q.shape[-1] ** -0.5
    O = torch.zeros(q.shape, dtype=torch.float32, device=q.device)  # (batch, heads, tile_m, d)
    row_max = torch.full_like(O[..., :1], float("-inf"))  # (batch, heads, tile_m, 1)
    row_sum = torch.zeros_like(row_max)
    for k_block, v_block in zip(k.split(TILE_N, dim=2), v.split(TILE_N, dim=2), strict=True):
        S = (q @ k_block.transpose(-1, -2)).float() * scale  # (batch, heads, tile_m, tile_n)
        new_max = torch.maximum(row_max, S.amax(dim=-1, keepdim=True))
        alpha = torch.exp(row_max - new_max)
        P = torch.exp(S - new_max)
        O = O * alpha + (P.to(v.dtype) @ v_block).float()
        row_sum = row_sum * alpha + P.sum(dim=-1, keepdim=True)
        row_max = new_max
    return (O / row_sum).to(q.dtype)


if __name__ == "__main__":
    import run

    run.main(["--step", "2"])
