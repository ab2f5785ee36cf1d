"""How 8-bit products are computed: what an H200 was measured to do fastest, and what other GPUs measure for themselves.

`benchmarks.quantized layers` found the tables. Elsewhere, and for shapes that are not in them, a shape's ways are measured against
each other the first time it comes, never while a CUDA graph is recorded. The reason stays readable (`Choice.reason`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from quantization.tiles import Config, fits


class Choice(NamedTuple):
    """How a product is computed, and why so."""

    backend: str
    config: Config | None
    reason: str


class Shape(NamedTuple):
    """What a choice is made for: (rows, inputs) times (outputs, inputs) transposed, in 8 bits of one kind."""

    kind: str
    rows: int
    outputs: int
    inputs: int


def row_bucket(rows: int) -> int:
    """Row counts up to the next power of two are one class, from 64 on: what serves these serves their whole class."""
    return max(64, 1 << (rows - 1).bit_length())


class Choices:
    """The choice for each shape: from a table of an H200, or measured once in this process and remembered."""

    def __init__(self, table: Mapping[tuple, tuple[str, Config | None]]):
        self._table = table
        self._measured: dict[tuple, Choice] = {}

    def find(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, backends: tuple[str, ...],
        measure: Callable[[], Choice], unmeasured: Choice,
    ) -> Choice:  # fmt: skip
        """One of `backends`, for results of `dtype` on the CUDA `device`: remembered, from the table, or from `measure`.

        While a CUDA graph is recorded nothing can be measured: then `unmeasured` is the answer, and is not remembered.
        """
        key = shape._replace(rows=row_bucket(shape.rows))
        known = self._measured.get((key, dtype, device, backends))
        if known is not None:
            return known
        backend, config = self._table.get(key, (None, None))
        if backend in backends and _table_holds(config, key.rows, device, dtype):
            return Choice(backend, config, "the fastest on an H200 (table)")
        if torch.cuda.is_current_stream_capturing():
            return unmeasured
        made = self._measured[key, dtype, device, backends] = measure()
        return made


def _table_holds(config: Config | None, rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    """The tables are of an H200 and of 16-bit results: a tile of float32 results may not fit its shared memory."""
    runs = config is None or fits(config, rows, device)
    return runs and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) == (9, 0)


# (kind, rows up to, outputs, inputs) -> backend and configuration of a `QuantizedLinear`.
LAYERS: dict[tuple[str, int, int, int], tuple[str, Config | None]] = {
    ("int8", 256, 9216, 3072): ("triton", Config(64, 128, 128, 4, 3, "tma")),
    ("int8", 512, 9216, 3072): ("triton", Config(64, 128, 128, 4, 4, "gluon")),
    ("int8", 2048, 9216, 3072): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("int8", 8192, 9216, 3072): ("triton", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 256, 3072, 3072): ("triton", Config(64, 64, 128, 4, 6, "gluon")),
    ("int8", 512, 3072, 3072): ("triton", Config(64, 128, 128, 4, 4, "gluon")),
    ("int8", 2048, 3072, 3072): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("int8", 8192, 3072, 3072): ("triton", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 256, 12288, 3072): ("triton", Config(64, 128, 128, 4, 3, "tma")),
    ("int8", 512, 12288, 3072): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("int8", 2048, 12288, 3072): ("triton", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 8192, 12288, 3072): ("triton", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 256, 3072, 12288): ("triton", Config(64, 64, 128, 4, 6, "tma")),
    ("int8", 512, 3072, 12288): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("int8", 2048, 3072, 12288): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("int8", 8192, 3072, 12288): ("triton", Config(128, 256, 128, 8, 4, "gluon")),
    ("fp8", 256, 9216, 3072): ("scaled_mm", None),
    ("fp8", 512, 9216, 3072): ("scaled_mm", None),
    ("fp8", 2048, 9216, 3072): ("scaled_mm", None),
    ("fp8", 8192, 9216, 3072): ("scaled_mm", None),
    ("fp8", 256, 3072, 3072): ("triton", Config(64, 64, 128, 4, 6, "gluon")),
    ("fp8", 512, 3072, 3072): ("triton", Config(128, 128, 128, 8, 6, "gluon")),
    ("fp8", 2048, 3072, 3072): ("scaled_mm", None),
    ("fp8", 8192, 3072, 3072): ("scaled_mm", None),
    ("fp8", 256, 12288, 3072): ("scaled_mm", None),
    ("fp8", 512, 12288, 3072): ("scaled_mm", None),
    ("fp8", 2048, 12288, 3072): ("scaled_mm", None),
    ("fp8", 8192, 12288, 3072): ("scaled_mm", None),
    ("fp8", 256, 3072, 12288): ("triton", Config(64, 128, 128, 4, 4, "gluon")),
    ("fp8", 512, 3072, 12288): ("scaled_mm", None),
    ("fp8", 2048, 3072, 12288): ("scaled_mm", None),
    ("fp8", 8192, 3072, 12288): ("scaled_mm", None),
}

# The same for a `QuantizedPair`, measured with 220 rows of text before the image's.
PAIRS: dict[tuple[str, int, int, int], tuple[str, Config]] = {
    ("int8", 1024, 9216, 3072): ("joint", Config(128, 128, 128, 4, 3, "gluon")),
    ("int8", 4096, 9216, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 8192, 9216, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 16384, 9216, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 1024, 3072, 3072): ("joint", Config(64, 128, 128, 4, 3, "tma")),
    ("int8", 4096, 3072, 3072): ("joint", Config(128, 128, 128, 4, 3, "gluon")),
    ("int8", 8192, 3072, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 16384, 3072, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 1024, 12288, 3072): ("joint", Config(128, 128, 128, 4, 3, "gluon")),
    ("int8", 4096, 12288, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 8192, 12288, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 16384, 12288, 3072): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 1024, 3072, 12288): ("joint", Config(64, 128, 128, 4, 3, "tma")),
    ("int8", 4096, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 8192, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("int8", 16384, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("fp8", 1024, 9216, 3072): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 4096, 9216, 3072): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 8192, 9216, 3072): ("separate", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 16384, 9216, 3072): ("separate", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 1024, 3072, 3072): ("joint", Config(64, 128, 128, 4, 3, "tma")),
    ("fp8", 4096, 3072, 3072): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 8192, 3072, 3072): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 16384, 3072, 3072): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 1024, 12288, 3072): ("separate", Config(128, 128, 128, 4, 3, "gluon")),
    ("fp8", 4096, 12288, 3072): ("separate", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 8192, 12288, 3072): ("separate", Config(128, 128, 128, 4, 3, "gluon")),
    ("fp8", 16384, 12288, 3072): ("separate", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 1024, 3072, 12288): ("joint", Config(64, 128, 128, 4, 3, "tma")),
    ("fp8", 4096, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
    ("fp8", 8192, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "gluon")),
    ("fp8", 16384, 3072, 12288): ("joint", Config(128, 256, 128, 8, 4, "persistent")),
}
