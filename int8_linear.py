"""INT8 linear layers: int8 weights and int8 activations, summed in int32.

    >>> from torch import nn
    >>> from int8_linear import swap_linears
    >>> model = nn.Sequential(nn.Linear(3072, 3072), nn.GELU(), nn.Linear(3072, 10))
    >>> report = swap_linears(model)
    >>> print(report)
    1 linear layers quantised, 0.04 -> 0.01 GB; 1 left as they were
    >>> report.swapped, report.skipped
    (['0'], {'2': '3072 inputs and 10 outputs. Allowed: multiples of 16.'})
    >>> model[0]
    Int8Linear(3072, 3072, bias=True)

In the editor: `swap_linears(pipeline.transformer)`, or `load_pipeline(model, quantize="int8")`. On the command line:

    python int8_linear.py MODEL OUT        # quantises a diffusers folder's transformer once, file by file

Weights have a scale for each output, activations one for each row, both symmetric around zero. Sums are exact, so every
backend gives the same numbers up to the last rounding: "triton" (`quantization.products`), "int_mm" (cuBLASLt; on Hopper
slower than bf16, on other GPUs it may not be), and on the CPU "int_mm" too, which uses the processor's integer
instructions. `Int8Linear.choice` says which of them runs and why; `Int8Linear.forced = "int_mm"` forces one.
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

__all__ = ["Int8Linear", "Swapped", "default_filter", "no_rotation", "rotate_down_projections", "swap_linears"]


class Int8Linear(QuantizedLinear):
    """y = x W^T + b with int8 weights and int8 rows of x, summed exactly in int32.

    x: (..., K) float32, float16 or bfloat16, any leading shape, also empty; y: (..., N) in x's dtype. Each row of x is
    quantised by its largest magnitude when it comes. With normally distributed numbers y is 38 dB (SQNR) from the float
    layer's; a few large inputs make it worse, which `group` mends (see `rotate_down_projections`).

    Parameters: weight (N, K) int8, in -127 ... 127; scale (N,) float32, so that weight * scale is the float weight; bias
    (N,) of the float layer's dtype, or None. None of them is trained. `to` casts the bias only.

    `Int8Linear.from_float(linear)` makes one of an `nn.Linear`; `Int8Linear(K, N, bias)` an uninitialised one, for
    `load_state_dict`. Raises ValueError for K or N that are no multiples of 16, and for inputs of another width than K.

    Source: the vector-wise quantisation of LLM.int8() (arXiv 2208.07339), without its float outliers.
    """

    kind, eight_bit = "int8", torch.int8

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        """Those that can run: "triton" where the GPU's tensor cores take int8 (from Ampere on), "int_mm" everywhere."""
        return ["triton"] * (device.type == "cuda" and tensor_cores_support(device, torch.int8)) + ["int_mm"]

    def multiply(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        """The layer on rows x (R, K), R > 0, written to out (R, N), by one of `backends`."""
        if backend == "triton":
            assert config is not None
            products.multiply(x, Quantized(self.weight, self.scale), self.bias, out, config, gelu)
            return
        values, rows = x.values, len(x.scales)
        if values.is_cuda and rows <= 16:  # cuBLASLt's kernel begins at 17 rows
            values = F.pad(values, (0, 0, 0, 17 - rows))
        total = torch._int_mm(values, self.weight.t())[:rows]
        products.epilogue(total, x.scales, self.scale, self.bias, out, gelu)


def swap_linears(
    module: nn.Module,
    filter: Callable[[nn.Linear, str], str | None] = default_filter,
    group: Callable[[str], int] = no_rotation,
    device: torch.device | str | None = None,
) -> Swapped:
    """Replace the linear layers in `module` by `Int8Linear`, in place, and report what was done.

    module: a model, float32, float16 or bfloat16. Fuse a LoRA before: afterwards none can be.
    filter: called with each layer and its name; returns None to quantise the layer, or the reason why it stays as it is.
        The default keeps the layers of Qwen-Image that are small or sensitive; pass `lambda linear, name: None` for all.
    group: called with a layer's name; returns how many of its inputs at a time are rotated before they are quantised: 0
        for none, 16 or 256. `rotate_down_projections` rotates where Qwen-Image has outliers, and costs some speed.
    device: where layers are quantised and stay, one after the other, so that a model on the CPU needs no room for float
        layers there. By default each layer stays on the device of its weight.

    Returns `Swapped`: the names that were swapped, the reason for each layer that was not (also sizes that are no
    multiples of 16, subclasses of `nn.Linear`), and bytes of the swapped layers before and after. Printed it is a line.
    Raises ValueError, before anything is replaced, if `module` is itself a linear layer (use `Int8Linear.from_float`), or if the
    filter returns anything but a text or None: also for True and False, which elsewhere mean "take it" and "leave it".
    """
    return swap.swap_linears(module, Int8Linear, filter, group, device)


if __name__ == "__main__":
    from pipeline.quantize import quantize_main

    quantize_main(Int8Linear, __doc__ or "")
