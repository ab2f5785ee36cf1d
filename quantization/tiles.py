"""How a product is cut into tiles: the configurations of the kernels, which of them run where, and the order of tiles."""

from typing import NamedTuple

import torch

from quantization.languages import gluon, tl, triton

TALL = 32  # rows of tiles that pass over a weight in step (`locate_tile`)
TALL_ROWS = 2048  # the same for the Gluon kernel, in rows of the result
SHARED_MEMORY = 227 * 1024  # bytes of one multiprocessor, Hopper


class Config(NamedTuple):
    """How a kernel computes a product: tile sizes, warps, pipeline stages, and which kernel.

    `form` is "pointer", "tma", "persistent" or "gluon" (see `products`).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    form: str = "pointer"

    def __str__(self) -> str:
        return f"{self.form} {self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages"



# What is measured where the tables (`choices`) have no entry: few, because each costs a second of compiling once.
CANDIDATES = (
    Config(64, 128, 128, 4, 4),
    Config(128, 128, 128, 4, 4),
    Config(128, 128, 128, 8, 4),
    Config(64, 128, 128, 4, 4, "tma"),
    Config(128, 128, 128, 8, 4, "tma"),
    Config(128, 256, 128, 8, 4, "persistent"),
    Config(128, 128, 128, 4, 3, "tma"),
    Config(128, 128, 128, 8, 3, "tma"),
    Config(64, 128, 128, 4, 3, "tma"),
    Config(64, 64, 128, 4, 6, "tma"),
    Config(64, 64, 128, 4, 6, "gluon"),
    Config(64, 128, 128, 4, 4, "gluon"),
    Config(128, 128, 128, 4, 3, "gluon"),
    Config(128, 128, 128, 8, 4, "gluon"),
    Config(128, 128, 128, 8, 6, "gluon"),
    Config(128, 256, 128, 8, 4, "gluon"),
    Config(256, 128, 128, 8, 4, "gluon"),
)

PAIR_CANDIDATES = (
    Config(64, 128, 128, 4, 4),
    Config(64, 128, 128, 4, 3, "tma"),
    Config(128, 128, 128, 8, 3, "tma"),
    Config(128, 128, 128, 4, 3, "tma"),
    Config(128, 256, 128, 8, 4, "persistent"),
    Config(64, 128, 128, 4, 4, "gluon"),
    Config(128, 128, 128, 4, 3, "gluon"),
    Config(128, 128, 128, 8, 4, "gluon"),
    Config(128, 256, 128, 8, 4, "gluon"),
    Config(256, 128, 128, 8, 4, "gluon"),
)


def fits(config: Config, rows: int, device: torch.device) -> bool:
    """Whether `config` runs on `device` and makes sense for this number of rows."""
    capability = torch.cuda.get_device_capability(device)
    if config.form == "gluon" and (gluon is None or capability != (9, 0)):
        return False
    return (config.form == "pointer" or capability >= (9, 0)) and (config.block_m < 2 * rows or config.block_m == 64)


def tensor_cores_support(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run on `device`: int8 from Ampere on, e4m3 from Ada on."""
    least = (8, 0) if dtype == torch.int8 else (8, 9)
    return triton is not None and torch.cuda.get_device_capability(device) >= least


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


if triton is not None:

    @triton.jit
    def locate_tile(
        tile, rows, first, second, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
    ):
        """(first row, end of the rows, first column, first row of the weight) of a tile.

        GROUP rows of tiles pass over the columns in step, so that the weights of those columns stay in L2.
        """
        upper = tl.cdiv(first, BLOCK_M)
        tall, wide = upper + tl.cdiv(rows - first, BLOCK_M), tl.cdiv(columns, BLOCK_N)
        above = tile // (GROUP * wide) * GROUP
        height = tl.minimum(tall - above, GROUP)
        inner = tile % (GROUP * wide)
        m = above + inner % height
        is_first = m < upper
        row = tl.where(is_first, m * BLOCK_M, first + (m - upper) * BLOCK_M)
        return row, tl.where(is_first, first, rows), inner // height * BLOCK_N, tl.where(is_first, 0, second)
