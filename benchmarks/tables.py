"""The documents' tables from the result files, so that no figure is ever typed by hand.

`benchmarks/README.md` has all of them, the README the few that a person asks for first, SECURITY.md what `attacks` counted. Each file of `benchmark` is a table. The others say by their `kind` what they are: those of `techniques` and `soak` make
one section together, those of `memory`, `linear` and the accuracy of quantised models (`quality`) another.

A column whose value is the same in a whole file moves to the line above the table; one that the file lacks is left
away; a single figure that is missing is a dash.
"""

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "-"
MAIN_VIDEOS = ("still", "moving", "30% changed")  # side by side in a cell


def tables(folder: Path = RESULTS) -> str:
    """Markdown of the benchmark's files, one table a file."""
    return "\n\n".join(_table(path, result) for path, result in _files(folder, "benchmark"))


def technique_tables(folder: Path = RESULTS) -> str:
    """Markdown of the techniques' files, side by side in one table, and of the soaks. May be empty."""
    files = _files(folder, "techniques")
    parts = [_techniques(files)] if files else []
    return "\n\n".join(parts + [_soak(path, result) for path, result in _files(folder, "soak")])


def quantized_tables(folder: Path = RESULTS) -> str:
    """Markdown of what 8-bit layers cost in memory, time and accuracy. May be empty."""
    kinds = (("memory", _memory), ("linear", _linear), ("quality", _quality))
    return "\n\n".join(show(path, result) for kind, show in kinds for path, result in _files(folder, kind))


def figures(folder: Path = RESULTS) -> str:
    """Markdown of the README's few figures, each with the file that it comes from. A file that is missing is left away."""
    lines = [line for show in _FIRST_FIGURES for line in show(folder)]
    return _markdown(dict(zip(("what", "time or rate", "to compare", "from"), map(list, zip(*lines)), strict=True))) if lines else ""


def attack_counts(folder: Path = RESULTS) -> str:
    """Markdown of what was tried against the server and what came of it. May be empty."""
    return "\n\n".join(_attacks(path, result) for path, result in _files(folder, "attacks"))


# A document's sections: each stands between its markers and is written by its function.
DOCUMENTS: dict[Path, dict[str, Callable[[Path], str]]] = {
    ROOT / "README.md": {"figures": figures},
    ROOT / "benchmarks" / "README.md": {
        "benchmarks": tables,
        "quantized": quantized_tables,
        "techniques": technique_tables,
    },
    ROOT / "SECURITY.md": {"attacks": attack_counts},
}


def write_tables(documents=None, folder: Path = RESULTS, *, check: bool = False) -> None:
    """Puts each section between its markers. ValueError when there are files for one without markers; with `check`
    nothing is written, and a document that would change is a ValueError: an edited table, or one older than its file.
    """
    for path, sections in (DOCUMENTS if documents is None else documents).items():
        text = before = path.read_text()
        for name, section in sections.items():
            begin, end, new = f"<!-- {name}: begin -->", f"<!-- {name}: end -->", section(folder)
            if begin in text and end in text:
                head, rest = text.split(begin)
                text = f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}"
            elif new:
                raise ValueError(f"{path} has no place for results: the lines {begin} and {end}")
        if check and text != before:
            raise ValueError(f"{path} does not show what the result files say: python -m benchmarks.benchmark --tables")
        if not check:
            path.write_text(text)


def kind_of(result: dict) -> str | None:
    """Which program wrote a file: "techniques" and "soak", which say it, "benchmark", or None for one without a table."""
    if result.get("kind") == "alignment":
        return None
    if "kind" in result or "rows" not in result:
        return result.get("kind")
    return "benchmark" if all("subject" in row for row in result["rows"]) else None


def _files(folder: Path, kind: str) -> list[tuple[Path, dict]]:
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"), key=lambda p: p.stem)]
    return [(path, result) for path, result in found if kind_of(result) == kind]


def _where(path: Path) -> str:
    return f"`{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}`"


def _machine(path: Path, result: dict) -> str:
    known = ", ".join(f"{name} {result[name]}" for name in ("torch", "diffusers", "triton") if name in result)
    versions = f"{known}, commit {result['commit']}"
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
    """A line a file, a table of a row for each technique, and one of those that depend on how much changes.

    A cell of the first has the figures on MAIN_VIDEOS, in their order. Figures that depend on the machine stand once
    for each file, by its number; the others are of the first file that knows them.
    """
    heads, rows = [], {}
    for number, (path, result) in enumerate(files, 1):
        first = result["rows"][0] if result["rows"] else {}
        form = "weights {weights}, layers {quantize}, attention {attention_quantize}, {width}x{height}, steps {steps}, edits {edits}; {videos}"
        videos = ", ".join(dict.fromkeys(row["video"] for row in result["rows"]))
        named = {"attention_quantize": "none"} | first | {"edits": ", ".join(first.get("edits", [])), "videos": videos}
        what = form.format(**named) if first else "no rows"
        heads.append(f"({number}) {_machine(path, result)}: {what}.")
        for row in result["rows"]:
            rows.setdefault(row["technique"], {}).setdefault(number, {})[row["video"]] = row
    left_out = [(number, *item) for number, (_, result) in enumerate(files, 1) for item in result["left_out"].items()]
    absent = "; ".join(f"({number}) {name} ({why})" for number, name, why in left_out)
    # Each head is a paragraph's line: two spaces break it.
    parts = ["  \n".join(heads), _by_technique(rows, len(files)), _by_share(rows, len(files))]
    return "\n\n".join([*filter(None, parts), *([f"Not measured: {absent}."] if absent else [])])


def _by_technique(rows: dict[str, dict[int, dict]], files: int) -> str:
    columns = {"technique": list(rows)}
    # What a cell is made of: of this technique those of MAIN_VIDEOS that some file knows.
    known = [{name for by_video in row.values() for name in by_video} for row in rows.values()]
    videos = [[name for name in MAIN_VIDEOS if name in names] or sorted(names) for names in known]
    for heading, key, form in _TECHNIQUE_FIGURES:
        found = [_knowing(row, key) for row in rows.values()]
        columns[heading] = [_by_video(*pair, key, form) for pair in zip(found, videos, strict=True)]
    for number in range(1, files + 1):
        for heading, key, form in _TECHNIQUE_SPEEDS:
            found = [row.get(number, {}) for row in rows.values()]
            columns[f"({number}) {heading}"] = [_by_video(*pair, key, form) for pair in zip(found, videos, strict=True)]
    return _markdown({name: cells for name, cells in columns.items() if set(cells) != {MISSING}})


def _by_share(rows: dict[str, dict[int, dict]], files: int) -> str:
    """Of the techniques that were measured on more videos of a share of changed tokens than the first table has."""
    lines = []
    for technique, row in rows.items():
        videos = {name for by_video in row.values() for name in by_video if name.endswith("% changed")}
        if videos - set(MAIN_VIDEOS):
            lines += [(technique, name) for name in sorted(videos, key=lambda name: float(name.split("%")[0]))]
    columns = {"technique": [name for name, _ in lines], "changed": [video.split(" ")[0] for _, video in lines]}
    for heading, key, form in _SHARE_FIGURES:
        cells = []
        for name, video in lines:
            found = _knowing({number: {video: row.get(video, {})} for number, row in rows[name].items()}, key)
            cells.append(_by_video(found, [video], key, form))
        columns[heading] = cells
    for number in range(1, files + 1):
        for heading, key, form in _SHARE_SPEEDS:
            found = [rows[name].get(number, {}).get(video, {}).get(key) for name, video in lines]
            columns[f"({number}) {heading}"] = [MISSING if value is None else form(value) for value in found]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    return _markdown(columns) if lines else ""


def _knowing(row: dict[int, dict], key: str) -> dict:
    """Of one technique's figures in each file the first that has this one."""
    return next((by_video for by_video in row.values() if any(r.get(key) is not None for r in by_video.values())), {})


def _by_video(by_video: dict[str, dict], videos: list[str], key: str, form: Callable[[float], str]) -> str:
    """The figure on each of the videos, without the missing ones at the end."""
    values = [by_video.get(name, {}).get(key) for name in videos]
    while values and values[-1] is None:
        values.pop()
    return " / ".join(MISSING if value is None else form(value) for value in values) or MISSING


def _memory(path: Path, result: dict) -> str:
    """GPU memory against speed, a row for each choice."""
    columns = {
        "transformer": lambda row: row["quantize"],
        "attention": lambda row: row.get("attention_quantize", "none"),
        "text encoder": lambda row: row["text_encoder_quantize"],
        "transformer on the GPU, GB": lambda row: _number(row["transformer_gb"]),
        "everything resident, GB": lambda row: _number(row["resident_gb"]),
        "peak while loading, GB": lambda row: _number(row["loading"]["allocated_gb"]),
        "peak at 512x512, GB": lambda row: _number(row["512"]["running"]["allocated_gb"]),
        "taken from the GPU then, GB": lambda row: _number(row["512"]["running"]["used_gb"]),
        "card, GB": lambda row: f"{row['card_gb']:g}" if row.get("card_gb") else MISSING,
    }
    for size in ("256", "512"):
        columns[f"{size}x{size}, ms"] = lambda row, size=size: _number(row[size]["vlm_cached_ms"])
        columns[f"{size}x{size}, VLM fresh, ms"] = lambda row, size=size: _number(row[size]["vlm_fresh_ms"])
    cells = {name: [show(row) for row in result["rows"]] for name, show in columns.items()}
    return f"{_machine(path, result)}; {result['steps']} steps, full-size random weights.\n\n{_markdown(cells)}"


def _linear(path: Path, result: dict) -> str:
    """How many times as fast as bf16 the layers are alone, geometric means over the shapes."""
    means = result["means"]
    columns = {
        "in place, without the norm's own time": "in_place_gemm",
        "in place": "in_place",
        "alone, rows quantised by a kernel of its own": "layer",
        "product alone": "product",
    }
    cells = {
        "layers": [mean["kind"] for mean in means],
        "rows": [str(mean["rows"]) for mean in means],
        "goal": [f"{mean['bar']:g}x" for mean in means],
    }
    for heading, name in columns.items():
        cells[heading] = [f"{mean[name]:.2f}x" if name in mean else MISSING for mean in means]
    what = "against bf16: in place, what the fast path runs for a layer, with quantisation, bias and epilogue; alone, `F.linear`"
    return f"{_machine(path, result)}; {what} (see `benchmarks/quantized/layers.py`).\n\n{_markdown(cells)}"


def _quality(path: Path, result: dict) -> str:
    """The pocket model's evaluation with quantised layers."""
    rows = result["rows"]
    cells = {
        "layers": [row["quantize"] for row in rows],
        "attention": [row["attention_quantize"] for row in rows],
        "text encoder": [row["text_encoder_quantize"] for row in rows],
        "one picture, dB": [f"{row['one_picture']['psnr_db']:.2f}" for row in rows],
        "two pictures, dB": [f"{row['two_pictures']['psnr_db']:.2f}" for row in rows],
        "to the float picture, least / mean dB": [
            "{least:.1f} / {mean:.1f}".format(**row["psnr_to_float_db"]) if "psnr_to_float_db" in row else MISSING
            for row in rows
        ],
    }
    return f"{_machine(path, result)}; the pocket model, all edits on three photographs it never saw, 256x256, 2 steps.\n\n{_markdown(cells)}"


def _soak(path: Path, result: dict) -> str:
    """What the soak saw, in a sentence, and whatever it complains of."""
    first, last = result["resident_mb"]["after_warm_up"], result["resident_mb"]["end"]
    complaints = "; ".join(result["complaints"]) or "no newest frame lost, nothing crossed"
    return (
        f"Soak: {result['frames']:,} frames of {result['sessions']:,} sessions in {result['seconds']:.0f} s on "
        f"{_machine(path, result)}: resident memory {first:.0f} MB after warm-up, "
        f"{last:.0f} MB at the end; {complaints}."
    )


def _attacks(path: Path, result: dict) -> str:
    """What was sent, what was answered, how long a bystander waited, and whatever the file complains of."""

    def statuses(found: dict[str, int]) -> str:
        return ", ".join(f"{count:,} times {status}" for status, count in sorted(found.items()))

    load, videos, bystander, memory = (result[name] for name in ("load", "videos", "bystander", "memory_mb"))
    waits = ", ".join(f"{seconds:g} s for `{path}`" for path, seconds in bystander["worst_s"].items())
    served = {"live views": load["live"], "posting clients": load["posting"]}
    rows = {
        f"{result['schemathesis']['cases']:,} requests that schemathesis invented": f"{len(result['schemathesis']['failures'])} rounds with a failure",
        f"{result['pictures']['sent']:,} pictures with flipped bits": statuses(result["pictures"]["statuses"]),
        f"{videos['sent']:,} videos with flipped bits": f"{videos['edited']} edited, {videos['refused']} refused in a sentence",
        f"{result['hostile']['sent']:,} hostile bodies, in {result['minutes']:g} minutes during the load": statuses(result["hostile"]["statuses"]),
        "the load: " + ", ".join(f"{group['clients']} {name}" for name, group in served.items()): ", ".join(
            f"{group['frames']:,} frames of {name}" for name, group in served.items()
        ),
        f"a bystander, {bystander['asked']:,} times": f"waited at most {waits}; {statuses(bystander['statuses'])}",
        "memory of the server and its processes": f"{memory['before']} MB before, {memory['after']} MB after, at most {memory['most']} MB",
    }
    found = f"{len(result['complaints'])} complaints" if result["complaints"] else "No answer was a 5xx that is not promised"
    return f"{_machine(path, result)}. {found}.\n\n{_markdown({'what was tried': list(rows), 'what came of it': list(rows.values())})}"


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
    """What was asked for, whichever subject answers."""
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
_LOSS = ("loss, dB", "loss_db", lambda value: f"{value + 0.0:.1f}" if abs(value) >= 0.05 else "0.0")
_FLICKER = ("flicker", "flicker_ratio", lambda value: f"{value:.2f}x")
_COMPUTED = ("computed", "changed_tokens", lambda value: f"{value:.0%}")
_FPS = ("frames/s", "fps", lambda value: f"{value:.1f}")
_P50 = ("p50 ms", "median_ms", lambda value: f"{value:.0f}" if value >= 10 else _number(value))
_P95 = ("p95 ms", "p95_ms", lambda value: f"{value:.0f}" if value >= 10 else _number(value))
_TECHNIQUE_FIGURES = (_LOSS, _FLICKER, ("skipped", "skip_rate", lambda value: f"{value:.0%}"), _COMPUTED)
_TECHNIQUE_SPEEDS = (_FPS, _P50, _P95)
_SHARE_FIGURES = (_LOSS, _FLICKER)
_SHARE_SPEEDS = (_COMPUTED, _FPS, _P50, _P95)


def _rows(folder: Path, name: str) -> tuple[str, dict, list[dict]]:
    """(where it lies, the file, its rows); nothing where there is no such file."""
    path = folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    return _where(path), result, result.get("rows", [])


def _find(rows: list[dict], **asked) -> dict | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in asked.items())), None)


def _goals(folder: Path) -> list[tuple[str, ...]]:
    where, result, rows = _rows(folder, "h200-goals")
    lines = []
    for side in (256, 512, 1024):
        fast, stock = (_find(rows, subject=s, width=side, steps=2, vlm=v) for s, v in (("fast", "cached"), ("stock", "fresh")))
        if fast and stock:
            what = f"{side}x{side}, 2 steps, bf16, {result['device']}"
            lines.append((what, f"{_number(fast['median_ms'])} ms", f"stock {_number(stock['median_ms'])} ms", where))
    return lines


def _eight_bit(folder: Path) -> list[tuple[str, ...]]:
    where, result, rows = _rows(folder, "h200-quantized")
    found = [_find(rows, subject=s, width=512, steps=2) for s in ("fast-fp8-attention", "fast")]
    if not all(found):
        return []
    what = f"512x512, 2 steps, FP8 layers and attention, {result['device']}"
    return [(what, f"{_number(found[0]['median_ms'])} ms", f"bf16 {_number(found[1]['median_ms'])} ms", where)]


def _stream(folder: Path) -> list[tuple[str, ...]]:
    where, result, rows = _rows(folder, "techniques-h200-fp8")
    found = [_find(rows, technique=t, video="30% changed") for t in ("for 30 frames/s: reuse over frames, VLM once", "plain")]
    if not all(found):
        return []
    what = f"512x512 stream, 30 % of the picture changes, tokens reused, {result['device']}"
    return [(what, f"{found[0]['fps']:.1f} frames/s", f"without reuse {found[1]['fps']:.1f}", where)]


def _small_card(folder: Path) -> list[tuple[str, ...]]:
    where, _, rows = _rows(folder, "h200-memory-24gb")
    row = _find(rows, quantize="int8")
    if row is None:
        return []
    peak = row["512"]["running"]["used_gb"]
    what = f"512x512, 2 steps, INT8, on a GPU limited to {row['card_gb']:g} GB"
    return [(what, f"{_number(row['512']['vlm_cached_ms'])} ms", f"takes {_number(peak)} GB", where)]


def _live(folder: Path) -> list[tuple[str, ...]]:
    where, _, rows = _rows(folder, "live-view")
    row = _find(rows, case="slow-model")
    if row is None:
        return []
    what = f"live view with a model of {row['delay_ms']} ms: camera to screen"
    return [(what, f"{row['latency_p50_ms']:.0f} ms", f"95 %: {row['latency_p95_ms']:.0f} ms", where)]


def _pocket(folder: Path) -> list[tuple[str, ...]]:
    where, result, rows = _rows(folder, "pocket-cpu")
    fast, stock = (_find(rows, subject=s, steps=2, vlm=v) for s, v in (("fast", "cached"), ("stock", "fresh")))
    if not (fast and stock):
        return []
    what = f"256x256, 2 steps, the embedded model, {result['device']}"
    return [(what, f"{_number(fast['median_ms'])} ms", f"stock {_number(stock['median_ms'])} ms", where)]


_FIRST_FIGURES = (_goals, _eight_bit, _stream, _small_card, _live, _pocket)
