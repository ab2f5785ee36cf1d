"""A diffusers folder quantised once: the command of `int8_linear` and `fp8_linear`.

Without a LoRA one file of weights is in memory at a time; a LoRA changes most layers, so then the transformer is, and
nothing else of the pipeline.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from pipeline import lora
from pipeline.sampling import lightning_scheduler
from quantization.folder import prepare_folder, quantize_folder, save_quantized
from quantization.layer import QuantizedLinear
from quantization.swap import Swapped, default_filter, no_rotation, rotate_down_projections, swap_linears


def quantize_main(kind: type[QuantizedLinear], description: str, arguments: list[str] | None = None) -> None:
    """The command line. Prints what was swapped; exits with 2 and a sentence for what it cannot do."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a diffusers folder")
    parser.add_argument("out", type=Path, help="the folder to write; must be empty or new")
    parser.add_argument(
        "--lora", help="fused before; afterwards none can be. As the program takes it: lightning-4, ..."
    )
    parser.add_argument("--lora-weight", type=float, default=1.0)
    parser.add_argument(
        "--rotate", action="store_true", help="for outliers: rotates the inputs behind the GELU; slower"
    )
    args = parser.parse_args(arguments)
    rotation = rotate_down_projections if args.rotate else no_rotation
    try:
        if args.lora is None:
            print(quantize_folder(args.model, args.out, kind, rotation))
        else:
            print(_quantize_with_lora(args, kind, rotation))
    except ValueError as error:
        parser.error(str(error))


def _quantize_with_lora(args: argparse.Namespace, kind: type[QuantizedLinear], rotation) -> Swapped:
    """On the CPU, in bfloat16. Raises ValueError; then a folder that was new is gone again."""
    new = not args.out.exists()
    prepare_folder(args.model, args.out)
    try:
        transformer = QwenImageTransformer2DModel.from_pretrained(
            args.model / "transformer", torch_dtype=torch.bfloat16
        )
        changes, lightning = lora.open_lora(args.lora, transformer, args.lora_weight)
        lora.fuse(transformer, changes, args.lora_weight)
        swapped = swap_linears(transformer, kind, default_filter, rotation)
        save_quantized(transformer, args.out / "transformer")
        if lightning:
            shutil.rmtree(args.out / "scheduler")
            lightning_scheduler().save_pretrained(args.out / "scheduler")
    except Exception:
        if new:
            shutil.rmtree(args.out)
        raise
    return swapped
