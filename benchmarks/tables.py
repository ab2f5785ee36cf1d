"""The README's tables from the result files, so that no figure is ever typed by hand.

A column whose value is the same in a whole file moves to the line above the table; one that the file lacks is left
away; a single figure that is missing is a dash.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
MISSING = "-"


def tables(folder: Path = RESULTS) -> str:
    """Markdown of all result files, one table a file."""
    return "\n\n".join(_table(path) for path in sorted(folder.glob("*.json")))


def write_tables(readme: Path = ROOT / "README.md", folder: Path = RESULTS) -> None:
    """Puts the tables between the markers of the README."""
    head, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{tables(folder)}\n{END}{rest.split(END)[1]}")


def _table(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = _by_case(result["rows"])
    settings = {name: [str(show(row)) for row in rows] for name, show in _SETTINGS.items()}
    figures = {name: [show(row, rows) for row in rows] for name, show in _FIGURES.items()}
    constant = {name for name, cells in settings.items() if len(set(cells)) <= 1}
    same = ", ".join(
        f"{name} {settings[name][0]}"
        for name in settings
        if name in constant and settings[name][:1] not in ([], [MISSING])
    )
    columns = {name: cells for name, cells in settings.items() if name not in constant}
    columns |= {name: cells for name, cells in figures.items() if set(cells) != {MISSING}}
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    head = (
        f"**{result['device']}**, torch {result['torch']}, diffusers {result['diffusers']}, commit {result['commit']}"
    )
    parts = [f"{head} (`{where}`)" + _start(result) + (f". All rows: {same}." if same else ".")]
    if rows:
        lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts += filter(None, (_accuracy(result.get("accuracy")), _new_prompts(result.get("new_prompts"))))
    # Of single cases the file tells; here only who is missing altogether.
    absent = [f"{name} ({why})" for name, why in result.get("left_out", {}).items() if ":" not in name]
    if absent:
        parts.append("Not measured: " + "; ".join(absent) + ".")
    return "\n\n".join(parts)


def _start(result: dict) -> str:
    """What is true of the file as a whole."""
    start = result.get("start", {})
    known = {
        "ceiling of a large matrix product {:.3g} TFLOPS": result.get("ceiling_tflops"),
        "load {:.3g} s": start.get("load_s"),
        "fast path on in {:.3g} s": start.get("fast_path_s"),
    }
    return "".join("; " + text.format(value) for text, value in known.items() if value is not None)


def _accuracy(found: dict | None) -> str:
    if found is None:
        return ""
    fast, other, levels = found["fast"], found["plain_in_another_order"], found["decoded_levels"]
    return (
        f"How exact, at {found['width']}x{found['width']} and {found['steps']} steps, as relative differences from the plain path: "
        f"latents {fast['latents']:.2g} (the plain path with its sums in another order: {other['latents']:.2g}), "
        f"embeddings {fast['embeddings']:.2g} ({other['embeddings']:.2g}), reference latents {fast['references']:.2g}; the "
        f"decoded picture differs by {levels['mean']:.2g} levels of 255 on average, {levels['max']} at most."
    )


def _new_prompts(found: list[dict] | None) -> str:
    if not found:
        return ""
    delays = ", ".join(f"{entry['extra_ms']:.0f} ms ({entry['text_tokens']} text tokens)" for entry in found)
    return f"A prompt of a new length costs its first frame, at 512x512: {delays}."


def _asked(row: dict) -> tuple:
    """What was asked for, whoever answers and by which savings."""
    return tuple(row.get(key, default) for key, default in _ASKED.items())


def _by_case(rows: list[dict]) -> list[dict]:
    """Rows of one case together, cases in the order in which they came; the file has them phase by phase."""
    order = list(dict.fromkeys(map(_asked, rows)))
    return sorted(rows, key=lambda row: order.index(_asked(row)))


def _against_stock(row: dict, rows: list[dict]) -> str:
    """Pictures a second, divided by stock's for the same output; stock has no batches."""
    alone = _asked({**row, "batch": 1})
    stock_ms = next((r["median_ms"] for r in rows if r["subject"] == "stock" and _asked(r) == alone), None)
    return MISSING if stock_ms is None else f"{row.get('batch', 1) * stock_ms / row['median_ms']:.1f}x"


def _tflops(row: dict) -> str:
    if row.get("tflops") is None:
        return MISSING
    share = row.get("ceiling_share")
    return _number(row["tflops"]) + ("" if share is None else f" ({share:.0%})")


def _number(value: float) -> str:
    """1234, 123, 12.3, 1.23; two figures below 1."""
    if value < 1:
        return f"{value:.2g}"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _area(row: dict) -> str:
    side = round(row["reference_area"] ** 0.5)
    return f"{side}x{side}" if side * side == row["reference_area"] else f"{row['reference_area']} pixels"


_ASKED = {"width": 0, "height": 0, "steps": 0, "cfg": 1.0, "references": 1, "batch": 1}
_SETTINGS = {
    "weights": lambda row: row["weights"],
    "size": lambda row: f"{row['width']}x{row['height']}",
    "steps": lambda row: row["steps"],
    "CFG": lambda row: f"{row.get('cfg', 1.0):g}",
    "references": lambda row: row.get("references", 1),
    "reference area": lambda row: _area(row) if "reference_area" in row else MISSING,
    "batch": lambda row: row.get("batch", 1),
    "quantised": lambda row: row.get("quantize", "none"),
    "VLM": lambda row: row.get("vlm", MISSING),
    "subject": lambda row: row["subject"],
}
_FIGURES = {
    "median ms": lambda row, rows: _number(row["median_ms"]),
    "p95 ms": lambda row, rows: _number(row["p95_ms"]),
    "frames/s": lambda row, rows: _number(row["fps"]),
    "against stock": _against_stock,
    "TFLOPS (of ceiling)": lambda row, rows: _tflops(row),
    # Files of before process memory was read have 0 for a CPU.
    "peak GB": lambda row, rows: _number(row["peak_memory_gb"]) if row.get("peak_memory_gb") else MISSING,
}
