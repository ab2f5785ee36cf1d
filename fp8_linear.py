"""FP8 linear layers: e4m3 weights and e4m3 activations, each output and each row with a scale of its own.

The same interface as `int8_linear`; what the two share is `quantized_linear`. Backends: "scaled_mm" (cuBLASLt or CUTLASS
through `torch._scaled_mm`, row-wise; bfloat16 results only), "triton" (see `quantized_kernels`), and on machines without
8-bit floating point "simulated": the same rounded numbers, multiplied in float32.

    python fp8_linear.py MODEL OUT         # quantises a diffusers folder's transformer once, file by file
"""

import torch
import torch.nn.functional as F

from quantization import products as kernels
from quantization import layer as shared
from quantization.products import Config, Quantized
from quantization.layer import QuantizedLinear

__all__ = ["Fp8Linear", "swap_linears"]


class Fp8Linear(QuantizedLinear):
    kind, eight_bit = "fp8", torch.float8_e4m3fn

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return ["simulated"]
        by_library = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
        triton = kernels.tensor_cores_take(device, torch.float8_e4m3fn)
        return ["scaled_mm"] * by_library + ["triton"] * triton or ["simulated"]

    def _run(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        if backend == "triton":
            kernels.multiply(x, Quantized(self.weight, self.scale), self.bias, out, config, gelu)
        elif backend == "scaled_mm":
            rows = x.scales
            if rows.data_ptr() % 16:  # cuBLASLt refuses them: a part that begins behind an odd number of text rows
                rows = rows.clone()
            scales = rows[:, None], self.scale[None, :]
            torch._scaled_mm(
                x.values, self.weight.t(), *scales, bias=self.bias, out_dtype=out.dtype, use_fast_accum=True, out=out
            )
            if gelu:
                out.copy_(F.gelu(out, approximate="tanh"))
        else:
            total = x.values.float() @ self.weight.float().t()
            kernels.finish(total, x.scales, self.scale, self.bias, out, gelu)


swap_linears = shared.swapper(Fp8Linear)


if __name__ == "__main__":
    from int8_linear import quantize_main

    quantize_main(Fp8Linear, __doc__)
