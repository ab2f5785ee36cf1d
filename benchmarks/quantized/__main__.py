"""8-bit layers, measured in three ways.

    python -m benchmarks.quantized layers     a layer by itself and in place; CUDA
    python -m benchmarks.quantized memory     what the whole system takes of a GPU, of a smaller card too; CUDA
    python -m benchmarks.quantized quality    the pocket model's pictures against those of float layers
"""

import importlib
import sys

PROGRAMS = ("layers", "memory", "quality")


def main(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] not in PROGRAMS:
        sys.exit(f"usage: python -m benchmarks.quantized {'|'.join(PROGRAMS)} [--help]")
    # Only the one that is asked for: it may set what torch reads when it is imported.
    return importlib.import_module(f"benchmarks.quantized.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
