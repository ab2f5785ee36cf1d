"""The benchmark of quantised layers says how many times as fast they are, and the README's tables show it."""

import json

import pytest

from benchmarks import tables
from benchmarks.quantized import layers as linear


def row(kind: str, rows: int, bf16: float, ours: float, norm: float) -> dict:
    """Alone the layer is half as fast as in its place, less the norm; its product alone is twice as fast."""
    place = {"bf16_us": bf16 + norm, "layer_us": ours + norm, "norm_us": norm}
    return {"kind": kind, "rows": rows, "bf16_us": bf16, "layer_us": 2 * ours, "product_us": ours / 2, "in_place": place}


def test_means_are_geometric_and_the_norms_own_time_counts_on_neither_side():
    shapes = [(40.0, 20.0, 10.0), (80.0, 10.0, 0.0)]  # twice and eight times as fast
    rows = [row(kind, count, *shape) for kind in linear.BARS for count in linear.ROWS for shape in shapes]
    means = linear.means(rows)
    assert [mean["bar"] for mean in means] == [*linear.BARS["int8"], *linear.BARS["fp8"]]
    for mean in means:
        assert mean["in_place_gemm"] == 4.0 and mean["layer"] == 2.0 and mean["product"] == 8.0
        assert mean["in_place"] == pytest.approx((50 / 30 * 8) ** 0.5, abs=1e-3)


def test_the_table_has_both_measures_and_an_older_file_only_the_one_it_has(tmp_path):
    rows = [row(kind, count, 40.0, 20.0, 10.0) for kind in linear.BARS for count in linear.ROWS]
    result = {"kind": "linear", "device": "a GPU", "torch": "2", "commit": "abc", "layers": rows, "means": linear.means(rows)}
    (tmp_path / "new.json").write_text(json.dumps(result))
    line = next(line for line in tables.quantized_tables(tmp_path).splitlines() if line.startswith("| int8 | 512 "))
    assert line == "| int8 | 512 | 1.2x | 2.00x | 1.67x | 1.00x | 4.00x |"
    for mean in result["means"]:
        del mean["in_place"], mean["in_place_gemm"]
    (tmp_path / "new.json").write_text(json.dumps(result))
    line = next(line for line in tables.quantized_tables(tmp_path).splitlines() if line.startswith("| int8 | 512 "))
    assert line == f"| int8 | 512 | 1.2x | {tables.MISSING} | {tables.MISSING} | 1.00x | 4.00x |"
