"""The tile tables: how each kernel is cut to its GPU, head dim and mask."""

from collections.abc import Iterator

from mini_flash_attention.gpu.config.backward import (
    SM90_BACKWARD_TILES,
    BackwardConfig,
    Workspace,
    backward,
    backward_configs,
    backward_sm90,
    workspace,
)
from mini_flash_attention.gpu.config.common import (
    DTYPES,
    ELEMENTS,
    HEAD_DIMS,
    MASKS,
    SHARED_MEMORY,
    bucket,
    gpu_arch,
    paths,
)
from mini_flash_attention.gpu.config.decode import (
    Decode,
    KvAppend,
    append_configs,
    decode,
    decode_configs,
)
from mini_flash_attention.gpu.config.forward import (
    SM90_PAGES,
    ForwardConfig,
    forward,
    forward_configs,
)

Config = ForwardConfig | BackwardConfig | Decode | KvAppend


def configs(arch: str) -> Iterator[Config]:
    """What `precompile --all` compiles: every row, dense, ragged and paged, with plain scores."""
    yield from forward_configs(arch)
    yield from backward_configs(arch)
    yield from decode_configs(arch)
    yield from append_configs(arch)
    for path in paths(arch):
        for row in (row for row in forward_configs(arch) if row.kernel == f"forward.{path}"):
            for page in (0, *(SM90_PAGES if path == "sm90" else (1,))):
                yield forward(path, arch, row.dtype, row.head_dim, row.mask, ragged=True, page=page)
