# Tasks of every day; CONTRIBUTING.md says what each is for.

run *flags:
    python webui_realtime.py {{flags}}

test:
    python -m pytest -m "not browser and not program"

test-all:
    python -m pytest

endurance:
    python -m pytest -m endurance

lint:
    ruff check .
    python -m benchmarks.benchmark --tables --check

types:
    pyright

tables:
    python -m benchmarks.benchmark --tables
