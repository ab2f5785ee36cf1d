"""The Triton kernels beside 8-bit attention, run by Triton's interpreter on CPU tensors, are their definitions.

Not collected by itself: TRITON_INTERPRET=1 has to be set before Triton is imported. `test_kernels.py` runs this file.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fast_path import attention
from fast_path.attention import EIGHT, Scales
from fast_path.kernels import Destinations

_convert_float, _patch_lang_tensor = interpreter._convert_float, interpreter._patch_lang_tensor


def _patch_loop_bounds(tensor, scope):
    """Triton 3.6's interpreter turns one-element arrays into loop bounds by int(), which NumPy 2.4 no longer allows."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _round_to_e4m3(numbers, given, wanted, mode):
    """And it cuts off what e4m3 cannot hold instead of rounding."""
    if wanted != tl.float8e4nv:
        return _convert_float(numbers, given, wanted, mode)
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).to(EIGHT).view(torch.uint8).numpy()


interpreter._convert_float, interpreter._patch_lang_tensor = _round_to_e4m3, _patch_loop_bounds


def eight(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(EIGHT)


@pytest.mark.parametrize("heads, width", [(3, 16), (9, 8)])
@pytest.mark.parametrize("moved", ["nothing", "keys and values", "all"])
def test_rows_are_normed_turned_and_rounded_to_where_they_belong(heads, width, moved):
    rows, places = 7, 12
    torch.manual_seed(0)
    qkv = torch.randn(rows, 3, heads, width).bfloat16()
    qkv[3, 2, 0, :5] = torch.tensor([1e6, -1e6, 0.0, 1e-9, 300.0])  # overflows, underflows
    weights = (1 + 0.3 * torch.randn(2, 2, width)).bfloat16()
    angles = torch.randn(rows, width // 2)
    kinds, positions = torch.randint(0, 6, (rows,), dtype=torch.int32), torch.randperm(rows).int()
    q, k = (attention.qk_scale(weights[:, i]) for i in range(2))
    values = torch.rand(heads) + 0.5
    scales = Scales(q, k, values, attention.output_scale(values))
    given = (qkv, kinds, positions, weights, angles.cos(), angles.sin(), 1e-6, scales)

    def written(quantize) -> Destinations:
        kept = eight(places, 3, heads, width)
        if moved == "nothing":
            to = Destinations(*kept[:rows].unbind(1), None)
        else:
            scattered = torch.randperm(places, generator=torch.Generator().manual_seed(1))[:rows].int()
            q = kept[:, 0] if moved == "all" else eight(rows, heads, width)
            to = Destinations(q, kept[:, 1], kept[:, 2], scattered)
        quantize(*given, to, moved == "all")
        return to

    for got, wanted in zip(written(attention._norm_rope_quantize_triton), written(attention.norm_rope_quantize)):
        if wanted is not None and wanted.dtype == EIGHT:
            assert wanted.float().any() and not wanted.float().isnan().any()
            different = got.view(torch.uint8) != wanted.view(torch.uint8)
            assert different.float().mean() < 1e-3, "but for what lies between two roundings, to the bit"
            torch.testing.assert_close(got.float(), wanted.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("batch, tokens, tile", [(1, 37, 128), (2, 200, 64)])
def test_values_are_transposed_with_their_columns_in_the_order_of_the_products(batch, tokens, tile):
    numbers = torch.randint(0, 256, (batch * tokens, 3, 2, 16), dtype=torch.uint8).view(EIGHT)
    v = numbers.view(batch, tokens, 3, 2, 16)[:, :, 2]
    got, wanted = attention._transposed_values_triton(v, tile), attention.transposed_values(v)
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
