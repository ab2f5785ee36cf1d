"""INT8 linear layers: int8 weights and int8 activations, summed in int32.

    from int8_linear import swap_linears
    print(swap_linears(pipeline.transformer))

    python int8_linear.py MODEL OUT        # quantises a diffusers folder's transformer once, file by file

Weights have a scale for each output, activations one for each row, both symmetric. Sums are exact, so that every backend
gives the same numbers up to the last rounding: "triton" (see `quantized_kernels`), "int_mm" (cuBLASLt; on Hopper slower
than bf16, on other GPUs it may not be), and on the CPU "int_mm" too, which uses the processor's integer instructions.
`QuantizedLinear.choice` says which runs and why; `Int8Linear.forced = "int_mm"` forces one.
"""

import torch
import torch.nn.functional as F

from quantization import kernels as kernels
from quantization import layer as shared
from quantization.kernels import Config, Quantized
from quantization.layer import QuantizedLinear, default_filter, rotate_down_projections

__all__ = ["Int8Linear", "default_filter", "rotate_down_projections", "swap_linears"]


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


if __name__ == "__main__":
    from pipeline.quantize import quantize_main

    quantize_main(Int8Linear, __doc__)
