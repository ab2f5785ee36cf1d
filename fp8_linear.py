"""FP8 linear layers: e4m3 weights and e4m3 activations, each output and each row with a scale of its own.

    >>> from torch import nn
    >>> from fp8_linear import swap_linears
    >>> model = nn.Sequential(nn.Linear(3072, 3072), nn.GELU(), nn.Linear(3072, 10))
    >>> report = swap_linears(model)
    >>> print(report)
    1 linear layers quantised, 0.04 -> 0.01 GB; 1 left as they were
    >>> report.swapped, report.skipped
    (['0'], {'2': '3072 inputs and 10 outputs. Allowed: multiples of 16.'})
    >>> model[0]
    Fp8Linear(3072, 3072, bias=True)

In the editor: `swap_linears(pipeline.transformer)`, or `load_pipeline(model, quantize="fp8")`. On the command line:

    python fp8_linear.py MODEL OUT         # quantises a diffusers folder's transformer once, file by file

The interface is that of `int8_linear`; what the two share is `quantization`. Backends: "scaled_mm" (cuBLASLt or CUTLASS
through `torch._scaled_mm`, row-wise; bfloat16 results only), "triton" (`quantization.products`), and on machines without
8-bit floating point "simulated": the same rounded numbers, multiplied in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from quantization import products, swap
from quantization.layer import QuantizedLinear
from quantization.rows import Quantized
from quantization.swap import Swapped, default_filter, no_rotation, rotate_down_projections
from quantization.tiles import Config, tensor_cores_support

__all__ = ["Fp8Linear", "Swapped", "default_filter", "no_rotation", "rotate_down_projections", "swap_linears"]


class Fp8Linear(QuantizedLinear):
    """y = x W^T + b with e4m3 weights and e4m3 rows of x, summed in float32.

    x: (..., K) float32, float16 or bfloat16, any leading shape, also empty; y: (..., N) in x's dtype. Each row of x is
    quantised by its largest magnitude when it comes. e4m3 has 3 bits behind the point, an error of 2.6 % for each number:
    y is 28.6 dB (SQNR) from the float layer's whatever the data, outliers included.

    Parameters: weight (N, K) float8_e4m3fn, in -448 ... 448; scale (N,) float32, so that weight * scale is the float
    weight; bias (N,) of the float layer's dtype, or None. None of them is trained. `to` casts the bias only.

    `Fp8Linear.from_float(linear)` makes one of an `nn.Linear`; `Fp8Linear(K, N, bias)` an uninitialised one, for
    `load_state_dict`. Raises ValueError for K or N that are no multiples of 16, and for inputs of another width than K.

    Source: the format is e4m3 of "FP8 Formats for Deep Learning" (arXiv 2209.05433, section 3).
    """

    kind, eight_bit = "fp8", torch.float8_e4m3fn

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        """Those that can run: "scaled_mm" from Hopper on, "triton" from Ada on, else "simulated"."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return ["simulated"]
        by_library = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
        triton = tensor_cores_support(device, torch.float8_e4m3fn)
        return ["scaled_mm"] * by_library + ["triton"] * triton or ["simulated"]

    def multiply(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        """The layer on rows x (R, K), R > 0, written to out (R, N), by one of `backends`."""
        if backend == "triton":
            assert config is not None
            products.multiply(x, Quantized(self.weight, self.scale), self.bias, out, config, gelu)
        elif backend == "scaled_mm":
            row_scales = x.scales
            if row_scales.data_ptr() % 16:  # cuBLASLt refuses them: rows that begin after an odd number of text rows
                row_scales = row_scales.clone()
            scales = row_scales[:, None], self.scale[None, :]
            torch._scaled_mm(
                x.values, self.weight.t(), *scales, bias=self.bias, out_dtype=out.dtype, use_fast_accum=True, out=out
            )
            if gelu:
                out.copy_(F.gelu(out, approximate="tanh"))
        else:
            total = x.values.float() @ self.weight.float().t()
            products.epilogue(total, x.scales, self.scale, self.bias, out, gelu)


def swap_linears(
    module: nn.Module,
    filter: Callable[[nn.Linear, str], str | None] = default_filter,
    group: Callable[[str], int] = no_rotation,
    device: torch.device | str | None = None,
) -> Swapped:
    """Replace the linear layers in `module` by `Fp8Linear`, in place, and report what was done.

    module: a model, float32, float16 or bfloat16. Fuse a LoRA before: afterwards none can be.
    filter: called with each layer and its name; returns None to quantise the layer, or the reason why it stays as it is.
        The default keeps the layers of Qwen-Image that are small or sensitive; pass `lambda linear, name: None` for all.
    group: called with a layer's name; returns how many of its inputs at a time are rotated before they are quantised: 0
        for none, 16 or 256. `rotate_down_projections` rotates where Qwen-Image has outliers, and costs some speed.
    device: where layers are quantised and stay, one after the other, so that a model on the CPU needs no room for float
        layers there. By default each layer stays on the device of its weight.

    Returns `Swapped`: the names that were swapped, the reason for each layer that was not (also sizes that are no
    multiples of 16, subclasses of `nn.Linear`), and bytes of the swapped layers before and after. Printed it is a line.
    Raises ValueError, before anything is replaced, if `module` is itself a linear layer (use `Fp8Linear.from_float`), or if the
    filter returns anything but a text or None: also for True and False, which elsewhere mean "take it" and "leave it".
    """
    return swap.swap_linears(module, Fp8Linear, filter, group, device)


if __name__ == "__main__":
    from pipeline.quantize import quantize_main

    quantize_main(Fp8Linear, __doc__ or "")
