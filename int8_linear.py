"""INT8 linear layers: int8 weights and int8 activations, summed in int32.

    from int8_linear import swap_linears
    print(swap_linears(pipeline.transformer))

    python int8_linear.py MODEL OUT        # quantises a diffusers folder's transformer once, file by file

Weights have a scale for each output, activations one for each row, both symmetric. Sums are exact, so that every backend
gives the same numbers up to the last rounding: "triton" (see `quantized_kernels`), "int_mm" (cuBLASLt; on Hopper slower
than bf16, on other GPUs it may not be), and on the CPU "int_mm" too, which uses the processor's integer instructions.
`QuantizedLinear.choice` says which runs and why; `Int8Linear.forced = "int_mm"` forces one.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from quantization import products as kernels
from quantization import layer as shared
from quantization.products import Config, Quantized
from quantization.layer import QuantizedLinear, Swapped, default_filter, no_rotation, rotate_down_projections

__all__ = ["Int8Linear", "default_filter", "quantize_main", "rotate_down_projections", "swap_linears"]


class Int8Linear(QuantizedLinear):
    kind, eight_bit = "int8", torch.int8

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        return ["triton"] * (device.type == "cuda" and kernels.tensor_cores_take(device, torch.int8)) + ["int_mm"]

    def _run(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        if backend == "triton":
            kernels.multiply(x, Quantized(self.weight, self.scale), self.bias, out, config, gelu)
            return
        values, rows = x.values, len(x.scales)
        if values.is_cuda and rows <= 16:  # cuBLASLt's kernel begins at 17 rows
            values = F.pad(values, (0, 0, 0, 17 - rows))
        total = torch._int_mm(values, self.weight.t())[:rows]
        kernels.finish(total, x.scales, self.scale, self.bias, out, gelu)


swap_linears = shared.swapper(Int8Linear)


def quantize_main(kind: type[QuantizedLinear], description: str, arguments=None) -> None:
    """The command line of `int8_linear` and `fp8_linear`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a diffusers folder")
    parser.add_argument("out", type=Path, help="the folder to write; must be empty or new")
    parser.add_argument(
        "--lora", help="fused before; afterwards none can be. As the program takes it: lightning-4, ..."
    )
    parser.add_argument("--lora-weight", type=float, default=1.0)
    parser.add_argument("--rotate", action="store_true", help="for outliers: rotates the inputs behind the GELU; slower")
    args = parser.parse_args(arguments)
    rotation = rotate_down_projections if args.rotate else no_rotation
    try:
        if args.lora is None:
            print(shared.quantize_folder(args.model, args.out, kind, rotation))
        else:
            print(_quantize_with_lora(args, kind, rotation))
    except ValueError as error:
        parser.error(str(error))


def _quantize_with_lora(args: argparse.Namespace, kind: type[QuantizedLinear], rotation) -> Swapped:
    """Needs the whole transformer in memory, on the CPU: a LoRA changes most of its layers. Raises ValueError."""
    from cached_pipeline import load_pipeline

    shared.prepare_folder(args.model, args.out)
    pipeline = load_pipeline(str(args.model), lora=args.lora, lora_weight=args.lora_weight, dtype=torch.bfloat16)
    swapped = shared.swap_linears(pipeline.transformer, kind, default_filter, rotation)
    shared.save_quantized(pipeline.transformer, args.out / "transformer")
    shutil.rmtree(args.out / "scheduler")
    pipeline.scheduler.save_pretrained(args.out / "scheduler")  # a Lightning LoRA has brought its own
    return swapped


if __name__ == "__main__":
    quantize_main(Int8Linear, __doc__)
