"""GPU memory against speed: the full-size model in bfloat16 and quantised, loaded as the program loads it.

    python -m benchmarks.quantized memory --out benchmarks/results/h200-memory.json [--card-gb 24]

Weights are random and lie on the CPU first, one block's for all of its kind, so that 58 GB of them need not exist. From
there on everything is the program's: quantised layer by layer on the GPU, moved, put on the fast path, then edits of new
pictures with the vision-language model run for each ("fresh") and for the first only ("cached"). `loading`, `starting`
(the fast path put in and warmed up) and `running` are torch's peaks in GB (1e9 bytes), each phase's own: allocated, what
tensors hold; reserved, what torch took from the GPU for them. `used` is all that the GPU has given away at the phase's
end, CUDA's own share included. With `--card-gb` torch refuses to take more than a card with that many GB could give it: 0.8
GB are left to CUDA, which takes 0.77 on an H200. A card that is sold as 24 GB has 25.7.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from pathlib import Path

# As the program does (see `webui_realtime`). Read when torch is loaded.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from accelerate import init_empty_weights
from torch import nn

import fast_path
from benchmarks import subjects
from benchmarks.instruments import pictures
from cached_pipeline import quantization_kind
from pipeline import placement
from pipeline.images import download

# (transformer's layers, its attention, text encoder)
CHOICES = (
    ("none", "none", "none"),
    ("fp8", "none", "none"),
    ("fp8", "fp8", "none"),
    ("int8", "fp8", "none"),
    ("fp8", "fp8", "int8"),
    ("int8", "fp8", "int8"),
)
SIZES, STEPS = (256, 512), 2
CUDA_GB = 0.8  # its context, code and libraries


def pipeline_on_the_cpu(pieces: dict[tuple, torch.Tensor]):
    """`random_pipeline` with its weights in few `pieces` of CPU memory, which are made if they are not there yet."""
    with init_empty_weights():
        pipeline = subjects.random_pipeline("cpu", torch.bfloat16)
    pipeline.caches_enabled = False
    for component in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        for module in component.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(_piece(pieces, name, parameter), False)
    return pipeline


def _piece(pieces: dict, name: str, like: torch.Tensor) -> torch.Tensor:
    key = (name, tuple(like.shape))
    if key not in pieces:
        bound, some = like.shape[-1] ** -0.5, min(like.numel(), 2**22 - 3)
        value = torch.empty(some).uniform_(-bound, bound) + float(like.dim() == 1 and name == "weight")  # norms: near one
        value = value.to(torch.bfloat16).repeat(-(-like.numel() // some))
        pieces[key] = value[: like.numel()].view(like.shape)
    return pieces[key]


def measure(
    pieces: dict, transformer: str, attention: str, text_encoder: str, runs: int, card_gb: float | None = None
) -> dict:
    """One row: loads and edits."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    pipeline = pipeline_on_the_cpu(pieces)
    began = time.perf_counter()
    pipeline.attention_quantize = fast_path.attention_kind(pipeline.transformer, attention, device)
    kinds = {"transformer": quantization_kind(transformer), "text_encoder": quantization_kind(text_encoder)}
    placement.finish(pipeline, device, (None, 1.0), kinds, lambda *_: None)
    torch.cuda.synchronize()
    row = {"quantize": transformer, "attention_quantize": attention, "text_encoder_quantize": text_encoder}
    row["card_gb"] = card_gb
    row |= {"loading_s": round(time.perf_counter() - began, 1), "loading": _peaks()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row["fast_path"] = [list(entry) for entry in pipeline.enable_fast_path()]
    row["transformer_gb"] = _gigabytes(pipeline.transformer)
    row["text_encoder_gb"] = _gigabytes(pipeline.text_encoder)
    row["starting"], row["resident_gb"] = _peaks(), round(torch.cuda.memory_allocated() / 1e9, 2)
    for size in SIZES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row[str(size)] = {f"vlm_{vlm}_ms": _frame_ms(pipeline, size, vlm, runs) for vlm in ("cached", "fresh")}
        row[str(size)] |= {"running": _peaks()}
    pipeline.release_memory()  # not `disable_fast_path`, which brings back what may not fit
    return row


def _frame_ms(pipeline, size: int, vlm: str, runs: int) -> float:
    source, kept, times = pictures(size, size, seed=size), None, []
    bank = itertools.cycle([next(source) for _ in range(8)])
    for i in range(runs + 3):
        picture = next(bank)
        torch.cuda.synchronize()
        began = time.perf_counter()
        slots = pipeline.open_references([picture])
        if kept is None or vlm == "fresh":
            kept = pipeline.encode_prompt(subjects.PROMPT, slots)[0]
        references = pipeline.encode_references(slots, area=size * size)
        noise, schedule = pipeline.initial_noise(size, size, 0), pipeline.schedule(STEPS, size, size)
        download(pipeline.decode(pipeline.denoise(noise, references, kept, None, schedule), size, size))
        if i >= 3:
            times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times), 2)


def _peaks() -> dict:
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "used_gb": round((total - free) / 1e9, 2),
    }


def _gigabytes(module: nn.Module) -> float:
    """What its parameters hold on the GPU: views of one memory once."""
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters() if p.is_cuda}
    return round(sum(held.values()) / 1e9, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--commit", help="of the code, for the result file")
    parser.add_argument("--choices", nargs="+", help="of layers/attention/text encoder, as int8/fp8/int8 (default: all)")
    parser.add_argument("--card-gb", type=float, help="the memory of a smaller card, in 1e9 bytes, CUDA's share included")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args(argv)
    if args.card_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((args.card_gb - CUDA_GB) * 1e9 / total)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "diffusers")}
    result = {"kind": "memory", "device": torch.cuda.get_device_name(), **versions, "commit": args.commit}
    result |= {"steps": STEPS, "rows": []}
    pieces: dict[tuple, torch.Tensor] = {}
    for choice in [tuple(c.split("/")) for c in args.choices] if args.choices else CHOICES:
        result["rows"].append(measure(pieces, *choice, args.runs, args.card_gb))
        print(result["rows"][-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
