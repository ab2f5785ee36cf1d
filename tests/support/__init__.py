"""What tests share: no test file imports another. Pytest rewrites the asserts in here too (see `conftest.py`)."""
