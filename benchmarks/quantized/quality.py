"""What 8 bits cost in quality: the pocket model's edits, quantised and not, against the computed right answers.

    python -m benchmarks.quantized quality --out benchmarks/results/pocket-quantized.json

`pocket_model.evaluate` on the three photographs of `benchmarks/photos`, which the model never saw: all edits, 256x256, 2 steps,
on the fast path, on the CPU. There FP8 products and 8-bit attention are simulated: the same rounded numbers, summed in
float32. A row has the choice, the evaluation's figures, and `psnr_to_float_db`, the pictures against the unquantised
model's: the least over all cases and the mean.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.result_file import environment
from benchmarks.videos import PHOTOS
from cached_pipeline import load_pipeline
from pipeline.images import fit, open_image
from pocket_model.edits import EDITS
from pocket_model.evaluate import evaluate, psnr, summary

SIZE, STEPS = 256, 2
CHOICES = (  # of load_pipeline
    {},
    {"quantize": "int8"},
    {"quantize": "fp8"},
    {"attention_quantize": "fp8"},
    {"quantize": "int8", "attention_quantize": "fp8"},
    {"quantize": "fp8", "attention_quantize": "fp8"},
    {"quantize": "int8", "text_encoder_quantize": "int8"},
)


def measure(photos: dict, choice: dict, exact: dict | None, edits) -> tuple[dict, dict]:
    """The row, and the pictures by (edit, photo). `exact`: those of the unquantised model."""
    pipeline = load_pipeline("pocket", device="cpu", dtype=torch.float32, **choice)
    pipeline.enable_fast_path()
    cases, pictures = evaluate(pipeline, photos, SIZE, STEPS, edits)
    row = {name: choice.get(name, "none") for name in ("quantize", "attention_quantize", "text_encoder_quantize")}
    for count, name in ((1, "one_picture"), (2, "two_pictures")):
        if these := [case for case in cases if case["pictures"] == count]:
            row[name] = summary(these)
    if exact is not None:
        near = [psnr(picture, exact[case]) for case, picture in pictures.items()]
        row["psnr_to_float_db"] = {"least": round(min(near), 2), "mean": round(statistics.fmean(near), 2)}
    return row, pictures


def run(edits, commit: str | None) -> dict:
    photos = {file.name: fit(open_image(file.read_bytes()), SIZE, SIZE) for file in sorted(PHOTOS.glob("*.jpg"))}
    result = {"kind": "quality", **environment(torch.device("cpu"), commit), "size": SIZE, "steps": STEPS, "rows": []}
    exact = None
    for choice in CHOICES:
        row, pictures = measure(photos, choice, exact, edits)
        exact = exact or pictures
        result["rows"].append(row)
        print(row, flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", nargs="+", choices=[edit.name for edit in EDITS], help="default: all")
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    args = parser.parse_args(argv)
    result = run([edit for edit in EDITS if not args.edits or edit.name in args.edits], args.commit)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
