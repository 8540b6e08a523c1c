"""Exact attention, as fast as the best kernels, in code that reads like the paper."""

from mini_flash_attention.api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from mini_flash_attention.block_mask import BlockMask, create_block_mask
from mini_flash_attention.padding import pad_input, unpad_input
from mini_flash_attention.version import __version__

__all__ = [
    "__version__",
    "BlockMask",
    "create_block_mask",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "unpad_input",
]
