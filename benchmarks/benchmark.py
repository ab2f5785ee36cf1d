"""The one benchmark: edits the same pictures with stock diffusers and with ours, in one run, side by side.

    python -m benchmarks.benchmark --weights pocket --out benchmarks/results/pocket-cpu.json
    python -m benchmarks.benchmark --weights random --out benchmarks/results/h200.json      # full size, needs 62 GB of GPU
    python -m benchmarks.benchmark --tables                                                  # README tables from the files

Subjects: `stock` is `QwenImageEditPlusPipeline.__call__` on the same modules; `plain` is our pipeline without
accelerations; `fast` has the fast path on. Every run of a subject gets a picture it has never seen, and goes from a uint8
picture on the CPU to a uint8 picture on the CPU. The subjects take turns, so that a machine's drift meets them alike.

`vlm`: `fresh` runs the text encoder on every picture, `cached` keeps the first picture's embeddings. Stock is always fresh.
The file's form is the project's: {"device", "torch", "diffusers", "commit", "rows": [...]}; the last line printed is JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline

import loading
from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PROMPT = "make it a pencil sketch"


def random_pipeline(device: str, dtype: torch.dtype) -> CachedQwenImageEditPipeline:
    """Qwen-Image-Edit-2509's anatomy with random weights, built on the device (61 GB in bf16, some 20 s).

    Speed does not depend on the values. The tokenizer is the pocket model's, which has the same 64-token system prefix.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = loading.picture_processor(loading.POCKET_FOLDER)
    processor.image_processor.patch_size = 14
    small = Qwen2_5_VLConfig.from_pretrained(loading.POCKET_FOLDER / "text_encoder")
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{key: getattr(small, key) for key in ids})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = diffusers.QwenImageTransformer2DModel()
            vae = diffusers.AutoencoderKLQwenImage()
            text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    pipeline = CachedQwenImageEditPipeline(
        scheduler=loading.lightning_scheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.to(dtype).eval(),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(width: int, height: int, seed: int = 0):
    """Endless distinct uint8 pictures (H, W, 3): smooth colour fields with a little noise, none seen twice."""
    random = np.random.default_rng(seed)
    while True:
        coarse = random.uniform(0, 255, (5, 5, 3))
        rows, columns = np.linspace(0, 3.999, height), np.linspace(0, 3.999, width)
        r, c = rows.astype(int), columns.astype(int)
        fr, fc = (rows - r)[:, None, None], (columns - c)[None, :, None]
        top = coarse[r][:, c] * (1 - fc) + coarse[r][:, c + 1] * fc
        bottom = coarse[r + 1][:, c] * (1 - fc) + coarse[r + 1][:, c + 1] * fc
        picture = top * (1 - fr) + bottom * fr + random.normal(0, 4, (height, width, 3))
        yield picture.clip(0, 255).astype(np.uint8)


class Clock:
    """Wall milliseconds with the device drained at both ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stages: dict[str, list[float]] = {}
        self.denoise_flop = 0.0

    def now_ms(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    @contextmanager
    def stage(self, name: str):
        began = self.now_ms()
        yield
        self.stages.setdefault(name, []).append(self.now_ms() - began)


def edit_ours(
    pipeline, frames: list[np.ndarray], width: int, height: int, steps: int, area: int, vlm: str, clock: Clock
):
    """One edit through the five steps; stage times go to the clock."""
    with clock.stage("encode_prompt"):
        if vlm == "fresh":
            embeds, mask = pipeline.encode_prompt(PROMPT, frames)
        else:
            if not hasattr(pipeline, "_benchmark_embeds"):
                pipeline._benchmark_embeds = {}
            key = len(frames)
            if key not in pipeline._benchmark_embeds:
                pipeline._benchmark_embeds[key] = pipeline.encode_prompt(PROMPT, frames)
            embeds, mask = pipeline._benchmark_embeds[key]
    with clock.stage("encode_references"):
        references = pipeline.encode_references(frames, area=area, width=width, height=height)
    with clock.stage("denoise"):
        schedule = pipeline.schedule(steps, width, height)
        noise = pipeline.initial_noise(width, height, 0)
        latents = pipeline.denoise(noise, references, embeds, mask, schedule)
    image_tokens = noise.shape[1] + references.latents.shape[1]
    clock.denoise_flop = steps * transformer_flop(pipeline.transformer.config, image_tokens, embeds.shape[1])
    with clock.stage("decode"):
        return pipeline.decode(latents, width, height).cpu()


def transformer_flop(config, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one forward: 12 d^2 multiply-adds a token and block, and the joint attention."""
    d, tokens = config.num_attention_heads * config.attention_head_dim, image_tokens + text_tokens
    return config.num_layers * (24.0 * d * d * tokens + 4.0 * tokens * tokens * d)


def edit_stock(pipeline, frames: list[np.ndarray], width: int, height: int, steps: int):
    from PIL import Image

    out = pipeline(
        image=[Image.fromarray(f) for f in frames],
        prompt=PROMPT,
        width=width,
        height=height,
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    return np.asarray(out.images[0])


def measure(subjects: dict, case: dict, runs: int, warmup: int, device: torch.device) -> list[dict]:
    """The subjects in turn on new pictures; one row a subject."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    clocks = {name: Clock(device) for name in subjects}
    peaks = dict.fromkeys(subjects, 0.0)
    source = pictures(case["width"], case["height"])
    for i in range(warmup + runs):
        for name, edit in subjects.items():
            frames = [next(source) for _ in range(case["references"])]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            if i == warmup:
                clocks[name].stages.clear()
            began = clocks[name].now_ms()
            edit(frames, clocks[name])
            spent = clocks[name].now_ms() - began
            if i >= warmup:
                times[name].append(spent)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) / 1e9)
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        stock = name == "stock"
        stages = {k: round(statistics.median(v), 2) for k, v in clocks[name].stages.items()}
        rows.append(
            {
                "subject": name,
                "cfg": 1.0,
                "batch": 1,
                "quantize": "none",
                "text_encoder_quantize": "none",
                "changed_tokens": 1.0,
                **case,
                "reference_area": 1024 * 1024 if stock else case["reference_area"],
                "vlm": "fresh" if stock else case["vlm"],
                "median_ms": round(median, 2),
                "p95_ms": round(float(np.percentile(values, 95)), 2),
                "fps": round(1e3 / median, 2),
                "peak_memory_gb": round(peaks[name], 2),
                "stages_ms": stages,
                "tflops": round(clocks[name].denoise_flop / stages["denoise"] / 1e9, 2) if stages else None,
                "runs": len(values),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def environment(device: torch.device, commit: str | None) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def run(args) -> dict:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began = time.perf_counter()
    if args.weights == "random":
        plain = random_pipeline(args.device, dtype)
    else:
        plain = load_pipeline(args.weights, device=args.device, dtype=dtype)
    plain.set_progress_bar_config(disable=True)
    plain.caches_enabled = False  # every picture is new: a cache would only cost its hashing
    fast = CachedQwenImageEditPipeline(**plain.components)
    fast.caches_enabled = False
    print(json.dumps({"fast_path": [list(map(str, line)) for line in fast.enable_fast_path()]}), flush=True)
    stock = QwenImageEditPlusPipeline(**plain.components)
    stock.set_progress_bar_config(disable=True)
    result = environment(device, args.commit) | {"load_s": round(time.perf_counter() - began, 1), "rows": []}
    for size in args.sizes:
        for steps in args.steps:
            for vlm in args.vlm:
                case = {
                    "weights": args.weights,
                    "width": size,
                    "height": size,
                    "steps": steps,
                    "references": args.references,
                    "reference_area": size * size,
                    "vlm": vlm,
                }

                def ours(pipeline, size=size, steps=steps, vlm=vlm):
                    return lambda frames, clock: edit_ours(pipeline, frames, size, size, steps, size * size, vlm, clock)

                subjects = {"plain": ours(plain), "fast": ours(fast)}
                if vlm == "fresh" and "stock" in args.subjects:
                    subjects["stock"] = lambda frames, clock, size=size, steps=steps: edit_stock(
                        stock, frames, size, size, steps
                    )
                subjects = {name: edit for name, edit in subjects.items() if name in args.subjects}
                result["rows"] += measure(subjects, case, args.runs, args.warmup, device)
    return result


def tables(folder: Path = RESULTS) -> str:
    """Markdown tables of all result files, one a file."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        head = f"**{result['device']}**, torch {result['torch']}, diffusers {result['diffusers']}, commit {result['commit']}"
        lines = [f"{head} (`{path.relative_to(ROOT)}`)", ""]
        lines.append("| weights | size | steps | VLM | subject | median ms | p95 ms | frames/s | against stock |")
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in result["rows"]:
            same = [
                r["median_ms"]
                for r in result["rows"]
                if r["subject"] == "stock" and (r["width"], r["steps"]) == (row["width"], row["steps"])
            ]
            ratio = f"{same[0] / row['median_ms']:.1f}x" if same else "-"
            lines.append(
                f"| {row['weights']} | {row['width']}x{row['height']} | {row['steps']} | {row['vlm']} | {row['subject']} "
                f"| {row['median_ms']:.0f} | {row['p95_ms']:.0f} | {row['fps']:.1f} | {ratio} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_tables() -> None:
    """Puts the tables between the markers of the README."""
    begin, end = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
    text = (ROOT / "README.md").read_text()
    head, rest = text.split(begin)
    (ROOT / "README.md").write_text(f"{head}{begin}\n{tables()}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="pocket", help="pocket, random (full size), or a model folder or id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--subjects", nargs="+", default=["stock", "plain", "fast"], choices=["stock", "plain", "fast"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--steps", nargs="+", type=int, default=[2])
    parser.add_argument("--vlm", nargs="+", default=["fresh"], choices=["fresh", "cached"])
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--tables", action="store_true", help="only rewrite the README's tables from the result files")
    args = parser.parse_args()
    if args.tables:
        write_tables()
        return
    result = run(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
