"""Measures the pocket model on photographs and phrasings that it never saw, through the pipeline that users run.

    python -m pocket_model.evaluate --photos photos/ [--model pocket] [--write]

For each edit and each held-out photograph: a held-out phrasing, 256x256, the given number of steps, no CFG, and then
- PSNR of the output against the computed answer, in dB;
- whether the output is nearer to its own answer than to that of any other edit with as many pictures (every colour of a
  tint or duotone counts as another edit);
- PSNR of the answer after the VAE alone, the ceiling of what the editor can reach.
`--write` puts the numbers into `evaluation.json`, the tables of `README.md` and `contact_sheet.jpg` in this folder.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cached_pipeline import load_pipeline
from pipeline.images import fit, open_image
from pocket_model.edits import EDITS, split

HERE = Path(__file__).parent
BAR_PSNR_DB, BAR_NEAREST, BAR_VAE_DB = 22.0, 0.95, 28.0


def held_out_pictures(folder: Path, size: int) -> dict[str, np.ndarray]:
    """The held-out photographs, cropped to `size` x `size`, uint8 (size, size, 3), by file name."""
    sources = json.loads((folder / "sources.json").read_text())
    names = sorted(entry["file"] for entry in sources if entry["split"] == "held-out")
    return {name: fit(open_image((folder / name).read_bytes()), size, size) for name in names}


def tensor(picture: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).square().mean().clamp_min(1e-10).log10())


def answers(pictures: int, sources: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The computed answer of every edit that takes as many pictures."""
    return {e.name: e.answer(*sources[: e.pictures]).clamp(0, 1) for e in EDITS if e.pictures == pictures}


def phrasing(edit, photo: str) -> str:
    """One of the edit's held-out phrasings, another one for another photograph, always the same one."""
    unseen = split(edit)[1]
    return unseen[int(hashlib.sha256(f"{edit.name}/{photo}".encode()).hexdigest(), 16) % len(unseen)]


def edit_picture(pipeline, sources: list[np.ndarray], prompt: str, size: int, steps: int) -> torch.Tensor:
    """The pipeline's output as float (1, 3, size, size) in [0, 1]."""
    out = pipeline(
        image=sources,
        prompt=prompt,
        width=size,
        height=size,
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(0),
        reference_area=size * size,
        output_type="uint8",
    ).images
    return out[:1].permute(0, 3, 1, 2).float().cpu() / 255


@torch.no_grad()
def reconstruct(pipeline, picture: np.ndarray) -> torch.Tensor:
    """The picture after the VAE's encoder and decoder: float (1, 3, H, W) in [0, 1]."""
    height, width = picture.shape[:2]
    references = pipeline.encode_references([picture], area=width * height, width=width, height=height)
    return pipeline.decode(references.latents, width, height).permute(0, 3, 1, 2).float().cpu() / 255


def evaluate(pipeline, photos: dict[str, np.ndarray], size: int, steps: int, edits=EDITS) -> tuple[list[dict], dict]:
    """One row a case, and the outputs by (edit, photo)."""
    rows, outputs = [], {}
    names = list(photos)
    for i, name in enumerate(names):
        sources = [photos[name], photos[names[(i + 3) % len(names)]]]
        tensors = [tensor(s) for s in sources]
        truth = {n: answers(n, tensors) for n in (1, 2)}
        for edit in edits:
            prompt = phrasing(edit, name)
            out = edit_picture(pipeline, sources[: edit.pictures], prompt, size, steps)
            distance = {other: float((out - t).square().mean()) for other, t in truth[edit.pictures].items()}
            rows.append(
                {
                    "edit": edit.name,
                    "family": edit.family,
                    "pictures": edit.pictures,
                    "photo": name,
                    "prompt": prompt,
                    "psnr_db": psnr(out, truth[edit.pictures][edit.name]),
                    "nearest": min(distance, key=distance.get),
                }
            )
            outputs[edit.name, name] = out
    return rows, outputs


def summary(rows: list[dict]) -> dict:
    return {
        "cases": len(rows),
        "psnr_db": round(float(np.mean([r["psnr_db"] for r in rows])), 2),
        "nearest": round(float(np.mean([r["nearest"] == r["edit"] for r in rows])), 4),
    }


def report(pipeline, folder: Path, steps: int) -> tuple[dict, dict, dict]:
    photos = held_out_pictures(folder, 256)
    rows, outputs = evaluate(pipeline, photos, 256, steps)
    families = list(dict.fromkeys(e.family for e in EDITS))
    origin = {entry["file"]: entry["name"] for entry in json.loads((folder / "sources.json").read_text())}
    reconstruction = {origin[n]: round(psnr(reconstruct(pipeline, p), tensor(p)), 2) for n, p in photos.items()}
    result = {
        "steps": steps,
        "size": 256,
        "photos": [origin[name] for name in photos],
        "vae_photo_psnr_db": round(float(np.mean(list(reconstruction.values()))), 2),
        "vae_photos_psnr_db": reconstruction,
        "one_picture": summary([r for r in rows if r["pictures"] == 1]),
        "two_pictures": summary([r for r in rows if r["pictures"] == 2]),
        "families": {f: summary([r for r in rows if r["family"] == f]) for f in families},
        "mistaken": [r for r in rows if r["nearest"] != r["edit"]],
        "also": [],
    }
    few = dict(list(photos.items())[:3])
    for size, other in ((256, 1), (256, 4), (128, steps), (384, steps)):
        pictures = few if size == 256 else dict(list(held_out_pictures(folder, size).items())[:3])
        one_each = list({e.family: e for e in EDITS}.values())
        result["also"].append(
            {"size": size, "steps": other} | summary(evaluate(pipeline, pictures, size, other, one_each)[0])
        )
    return result, outputs, photos


def tables(result: dict) -> str:
    """The card's tables, in Markdown."""
    one, two = result["one_picture"], result["two_pictures"]
    lines = [
        "| what | cases | measured | bar |",
        "|---|---|---|---|",
        f"| VAE reconstruction of held-out photographs | {len(result['photos'])} | {result['vae_photo_psnr_db']:.1f} dB | {BAR_VAE_DB:.0f} dB |",
    ]
    for name, part in (("one-picture edits", one), ("two-picture edits", two)):
        lines.append(
            f"| {name}: PSNR against the answer | {part['cases']} | {part['psnr_db']:.1f} dB | {BAR_PSNR_DB:.0f} dB |"
        )
        lines.append(
            f"| {name}: nearest to the own answer | {part['cases']} | {part['nearest']:.1%} | {BAR_NEAREST:.0%} |"
        )
    lines += ["", "| edit | cases | PSNR, dB | nearest to its own answer |", "|---|---|---|---|"]
    lines += [
        f"| {f} | {s['cases']} | {s['psnr_db']:.1f} | {s['nearest']:.0%} |" for f, s in result["families"].items()
    ]
    lines += ["", "| size | steps | cases (one an edit family) | PSNR, dB | nearest |", "|---|---|---|---|---|"]
    lines += [
        f"| {a['size']} | {a['steps']} | {a['cases']} | {a['psnr_db']:.1f} | {a['nearest']:.0%} |"
        for a in result["also"]
    ]
    return "\n".join(lines)


def contact_sheet(outputs: dict, photos: dict[str, np.ndarray], size: int = 128) -> Image.Image:
    """A row for each edit family: for three photographs source, output, computed answer."""
    families = {e.family: e for e in reversed(EDITS)}
    edits = [e for e in EDITS if families[e.family] is e]
    names = list(photos)
    shown = [names[i % len(names)] for i in (0, 2, 4)]
    columns = 2  # edits in a row of the sheet
    rows = -(-len(edits) // columns)
    sheet = Image.new("RGB", (columns * (len(shown) * 3 * size + 16), rows * (size + 4)), "white")
    for i, edit in enumerate(edits):
        for j, name in enumerate(shown):
            sources = [photos[name], photos[names[(names.index(name) + 3) % len(names)]]]
            truth = edit.answer(*[tensor(s) for s in sources[: edit.pictures]]).clamp(0, 1)
            for k, picture in enumerate((tensor(sources[0]), outputs[edit.name, name], truth)):
                pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                tile = Image.fromarray(pixels).resize((size - 2, size - 2), Image.LANCZOS)
                x = (i % columns) * (len(shown) * 3 * size + 16) + (j * 3 + k) * size
                sheet.paste(tile, (x, i // columns * (size + 4)))
    return sheet


def write(result: dict, sheet: Image.Image) -> None:
    (HERE / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet.save(HERE / "contact_sheet.jpg", quality=82)
    card = (HERE / "README.md").read_text()
    begin, end = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
    head, rest = card.split(begin)
    tail = rest.split(end)[1]
    (HERE / "README.md").write_text(f"{head}{begin}\n{tables(result)}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, type=Path, help="folder that pocket_model.photos wrote")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="update evaluation.json, the card and the contact sheet")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model, device="cpu", dtype=torch.float32)
    pipeline.enable_fast_path()
    began = time.monotonic()
    result, outputs, photos = report(pipeline, args.photos, args.steps)
    print(tables(result))
    print(f"measured in {time.monotonic() - began:.0f} s")
    if args.write:
        write(result, contact_sheet(outputs, photos))


if __name__ == "__main__":
    main()
