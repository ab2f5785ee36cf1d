"""What tests share: no test file imports another. Pytest rewrites the asserts in here too (see `conftest.py`)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository
