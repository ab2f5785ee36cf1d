"""The README's tables from the result files, so that no figure is ever typed by hand.

Each file of `benchmark` is a table. Those of `techniques` and `soak`, which say so as their `kind`, make one section
together. Files of other programs belong to no table here.

A column whose value is the same in a whole file moves to the line above the table; one that the file lacks is left
away; a single figure that is missing is a dash.
"""

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "-"


def tables(folder: Path = RESULTS) -> str:
    """Markdown of the benchmark's files, one table a file."""
    return "\n\n".join(_table(path, result) for path, result in _files(folder, "benchmark"))


def technique_tables(folder: Path = RESULTS) -> str:
    """Markdown of the techniques' files, side by side in one table, and of the soaks, a line each. May be empty."""
    files = _files(folder, "techniques")
    parts = [_techniques(files)] if files else []
    return "\n\n".join(parts + [_soak(path, result) for path, result in _files(folder, "soak")])


SECTIONS: dict[str, Callable[[Path], str]] = {"benchmarks": tables, "techniques": technique_tables}


def write_tables(readme: Path = ROOT / "README.md", folder: Path = RESULTS) -> None:
    """Puts each section between its markers in the README. ValueError when there are files for one without markers."""
    text = readme.read_text()
    for name, section in SECTIONS.items():
        begin, end, new = f"<!-- {name}: begin -->", f"<!-- {name}: end -->", section(folder)
        if begin in text and end in text:
            head, rest = text.split(begin)
            text = f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}"
        elif new:
            raise ValueError(f"{readme} has no place for results: the lines {begin} and {end}")
    readme.write_text(text)


def kind_of(result: dict) -> str | None:
    """Which program wrote a file: "techniques" and "soak", which say it, "benchmark", or None for another."""
    if "kind" in result or "rows" not in result:
        return result.get("kind")
    return "benchmark" if all("subject" in row for row in result["rows"]) else None


def _files(folder: Path, kind: str) -> list[tuple[Path, dict]]:
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(path, result) for path, result in found if kind_of(result) == kind]


def _where(path: Path) -> str:
    return f"`{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}`"


def _machine(path: Path, result: dict) -> str:
    versions = f"torch {result['torch']}, diffusers {result['diffusers']}, commit {result['commit']}"
    return f"**{result['device']}**, {versions} ({_where(path)})"


def _markdown(columns: dict[str, list[str]]) -> str:
    """A table of columns {heading: cells}."""
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(path: Path, result: dict) -> str:
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
    parts = [_machine(path, result) + _start(result) + (f". All rows: {same}." if same else ".")]
    if rows:
        parts.append(_markdown(columns))
    parts += filter(None, (_accuracy(result.get("accuracy")), _new_prompts(result.get("new_prompts"))))
    # Of single cases the file tells; here only who is missing altogether.
    absent = [f"{name} ({why})" for name, why in result.get("left_out", {}).items() if ":" not in name]
    if absent:
        parts.append("Not measured: " + "; ".join(absent) + ".")
    return "\n\n".join(parts)


def _techniques(files: list[tuple[Path, dict]]) -> str:
    """A line a file, and one table: a row for each technique, on the still and the moving video as "still / moving",
    and for each video of its own. Figures that depend on the machine stand once for each file, by its number.
    """
    heads, rows = [], {}
    for number, (path, result) in enumerate(files, 1):
        first = result["rows"][0] if result["rows"] else {}
        form = "weights {weights}, {width}x{height}, steps {steps}, edits {edits}" if first else "no rows"
        what = form.format(**first | {"edits": ", ".join(first.get("edits", []))})
        heads.append(f"({number}) {_machine(path, result)}: {what}.")
        for row in result["rows"]:
            video = "" if row["video"] in ("still", "moving") else row["video"]
            rows.setdefault((row["technique"], video), {}).setdefault(number, {})[row["video"]] = row
    columns = {"technique": [f"{name}, {video}" if video else name for name, video in rows]}
    for heading, key, form in _TECHNIQUE_FIGURES:  # of the first file that knows it
        cells = [_pair(row, key, form) for row in rows.values() for row in [_knowing(row, key)]]
        columns[heading] = cells
    for number in range(1, len(files) + 1):
        for heading, key, form in _TECHNIQUE_SPEEDS:
            columns[f"({number}) {heading}"] = [_pair(row.get(number, {}), key, form) for row in rows.values()]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    left_out = [(number, *item) for number, (_, result) in enumerate(files, 1) for item in result["left_out"].items()]
    absent = "; ".join(f"({number}) {name} ({why})" for number, name, why in left_out)
    # Each head is a paragraph's line: two spaces break it.
    return "\n\n".join(["  \n".join(heads), _markdown(columns), *([f"Not measured: {absent}."] if absent else [])])


def _knowing(row: dict[int, dict], key: str) -> dict:
    """Of one technique's figures in each file the first that has this one."""
    return next((by_video for by_video in row.values() if any(r.get(key) is not None for r in by_video.values())), {})


def _pair(by_video: dict[str, dict], key: str, form: Callable[[float], str]) -> str:
    """The figure on the still and on the moving video, or on the one that there is."""
    videos = [name for name in ("still", "moving") if name in by_video] or list(by_video)
    cells = [MISSING if by_video[name].get(key) is None else form(by_video[name][key]) for name in videos]
    return MISSING if not set(cells) - {MISSING} else " / ".join(cells)


def _soak(path: Path, result: dict) -> str:
    """What the soak saw, in a sentence, and whatever it complains of."""
    first, last = result["resident_mb"]["after_warm_up"], result["resident_mb"]["end"]
    complaints = "; ".join(result["complaints"]) or "no newest frame lost, nothing crossed"
    return (
        f"Soak: {result['frames']:,} frames of {result['sessions']:,} sessions in {result['seconds']:.0f} s on "
        f"{_machine(path, result)}: resident memory {first:.0f} MB after warm-up, "
        f"{last:.0f} MB at the end; {complaints}."
    )


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
_TECHNIQUE_FIGURES = (
    ("loss, dB", "loss_db", lambda value: f"{value + 0.0:.1f}" if abs(value) >= 0.05 else "0.0"),
    ("flicker", "flicker_ratio", lambda value: f"{value:.2f}x"),
    ("skipped", "skip_rate", lambda value: f"{value:.0%}"),
    ("computed", "changed_tokens", lambda value: f"{value:.0%}"),
)
_TECHNIQUE_SPEEDS = (
    ("frames/s", "fps", lambda value: f"{value:.1f}"),
    ("p50 ms", "median_ms", _number),
    ("p95 ms", "p95_ms", _number),
)
