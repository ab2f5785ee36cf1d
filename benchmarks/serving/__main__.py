"""A started server under load, for long, and under attack; this machine only.

    python -m benchmarks.serving load         many clients at once: served alike?
    python -m benchmarks.serving soak         thousands of frames: does anything grow?
    python -m benchmarks.serving attacks      what SECURITY.md counts
"""

import importlib
import sys

PROGRAMS = ("load", "soak", "attacks")


def main(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] not in PROGRAMS:
        sys.exit(f"usage: python -m benchmarks.serving {'|'.join(PROGRAMS)} [--help]")
    # Only the one that is asked for: it may set what torch reads when it is imported.
    return importlib.import_module(f"benchmarks.serving.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
