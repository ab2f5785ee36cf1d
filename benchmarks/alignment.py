"""Whether an unedited picture stays where it was: shift and scale between input and output, in pixels of the output.

    python -m benchmarks.alignment --out benchmarks/results/alignment-cpu.json

"keep it unchanged" on the pocket model, at sizes and shapes that do not fit the model's grid, through the library, the
engine and POST /edit: at no size given, and at both sides of the picture's shape. The input, scaled
to the output's size, is registered with the output: `shift_px` is that of the whole picture, (across, down), and
`scale_px` how far its halves have moved apart. Both would be 0; LIMIT_PX is what a person may rely on.

The registration is the peak of the cross-correlation, found to a fiftieth of a pixel (Guizar-Sicairos et al., 2008).
It is not normalised to phases alone: in a small picture most frequencies hold only what the VAE loses, and all would
count the same.
"""

import argparse
import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from skimage.registration import phase_cross_correlation

from benchmarks.result_file import environment
from benchmarks.videos import PHOTOS
from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline
from engine.fitting import size_in_shape
from pipeline.images import encode_png, fit, open_image
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine
from server import EngineHolder, create_app

LIMIT_PX = 0.5
PROMPT, STEPS = "keep it unchanged", 2
INPUTS = ((1000, 667), (431, 777), (1920, 1080), (3000, 600), (64, 64), (97, 61))
SIDE = 200  # of a square of the area of the sizes that are given
Door = Callable[[np.ndarray, int | None, int | None], np.ndarray]


def library(pipe: CachedQwenImageEditPipeline) -> Door:
    def edit(picture, width, height):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            picture, PROMPT, width=width, height=height, reference_area="output", num_inference_steps=STEPS,
            true_cfg_scale=1.0, generator=generator, output_type="uint8",
        ).images[0].numpy()  # fmt: skip

    return edit


def engine_door(engine: RealtimeEngine) -> Door:
    return lambda picture, width, height: engine.edit([picture], EditParams(PROMPT, width=width, height=height)).image


def http(engine: RealtimeEngine) -> Door:
    app = create_app(EngineHolder(engine))

    async def post(body):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=600) as client:
            answer = await client.post("/edit", json=body)
            return answer.raise_for_status().json()

    def edit(picture, width, height):
        image = base64.b64encode(encode_png(picture)).decode()
        answer = asyncio.run(post({"image": image, "prompt": PROMPT, "width": width, "height": height}))
        return open_image(base64.b64decode(answer["image"]))

    return edit


def displacement(before: np.ndarray, after: np.ndarray) -> dict[str, tuple[float, float]]:
    """`shift_px` and `scale_px`, (across, down), from `before` to `after`: uint8 (H, W, 3), the same size."""
    a, b = (np.asarray(Image.fromarray(picture).convert("L"), np.float64) for picture in (before, after))
    (h, w), half_w, half_h = a.shape, a.shape[1] // 2, a.shape[0] // 2
    down, across = _shift(a, b)
    left, right = (_shift(a[:, part], b[:, part])[1] for part in (slice(half_w), slice(w - half_w, w)))
    top, bottom = (_shift(a[part], b[part])[0] for part in (slice(half_h), slice(h - half_h, h)))
    scale = (2 * (right - left), 2 * (bottom - top))  # the halves' middles are half the picture apart
    return {"shift_px": (across, down), "scale_px": scale}


def _shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(down, across) by which `b` lies from `a`; both fade to nothing at their edges, which are no match."""
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in a.shape))
    a, b = ((x - x.mean()) * window for x in (a, b))
    down, across = phase_cross_correlation(b, a, upsample_factor=50, normalization=None)[0]
    return float(down), float(across)


def measure(door: Door, photo: np.ndarray, shape: tuple[int, int], width: int | None, height: int | None) -> dict:
    """One row: the edit of the photo cut to `shape`, against the same scaled to the result's size."""
    picture = fit(photo, *shape)
    after = door(picture, width, height)
    size = after.shape[1::-1]
    before = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    found = displacement(before, after)
    largest = max(abs(value) for pair in found.values() for value in pair)
    return {
        "input": list(shape), "asked": [width, height], "width": size[0], "height": size[1],
        **{name: [round(value, 2) for value in pair] for name, pair in found.items()},
        "largest_px": round(largest, 2), "psnr_db": round(float(peak_signal_noise_ratio(before, after)), 2),
    }  # fmt: skip


def run(inputs=INPUTS, commit: str | None = None) -> dict:
    photo = open_image((PHOTOS / "astronaut.jpg").read_bytes())
    pipe = load_pipeline("pocket", device="cpu", dtype=torch.float32)
    result = {"kind": "alignment", **environment(torch.device("cpu"), commit), "limit_px": LIMIT_PX, "rows": []}
    about = {"model": "pocket", "weights": "pocket", "steps": STEPS, "cfg": 1.0, "references": 1, "reference_area": "output"}

    def measure_all(subject: str, doors: dict[str, Door]) -> None:
        for name, door in doors.items():
            for shape in inputs:
                for width, height in ((None, None), size_in_shape(shape, SIDE)):
                    row = {"subject": subject, "door": name, **about, **measure(door, photo, shape, width, height)}
                    result["rows"].append(row)
                    print(row, flush=True)

    measure_all("plain", {"library": library(pipe)})
    with RealtimeEngine(pipe, EngineConfig()) as engine:
        measure_all("fast", {"engine": engine_door(engine), "POST /edit": http(engine)})
    result["largest_px"] = max(row["largest_px"] for row in result["rows"])
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    args = parser.parse_args(argv)
    result = run(commit=args.commit)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"The largest displacement is {result['largest_px']} pixels; allowed: {LIMIT_PX}.")
    return int(result["largest_px"] > LIMIT_PX)


if __name__ == "__main__":
    raise SystemExit(main())
