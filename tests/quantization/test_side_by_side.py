"""Weights as views of one buffer: nothing is stored twice, nothing that is packed already moves."""

import pytest
import torch
from torch import nn

from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from quantization.side_by_side import pack


def layers(*outputs: int, inputs=6, dtype=torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(inputs, n, dtype=dtype) for n in outputs]


def memory(*tensors: torch.Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 1), (1, 4), (8, 4)])
def test_packed_weights_are_views_of_one_buffer_with_zeros_between(dtype, rows, columns):
    parts = layers(3, 8, 5)
    for part in parts:
        part.weight = nn.Parameter(part.weight.data.to(dtype), requires_grad=False)
    before, parameters = [part.weight.data.clone() for part in parts], [part.weight for part in parts]
    buffer = pack(parts, "weight", rows=rows, columns=columns)
    width, starts = (8, [0, 8, 16, 24]) if columns == 4 else (6, [0, 8, 16, 24])
    starts = starts if rows == 8 else [0, 3, 11, 16]
    expected = torch.zeros(starts[-1], width)
    for start, weight in zip(starts, before, strict=False):
        expected[start : start + len(weight), :6] = weight.float()
    assert buffer.dtype == dtype and torch.equal(buffer.float(), expected)
    assert memory(buffer) == memory(*parameters), "nothing is stored twice"
    assert all(part.weight is parameter for part, parameter in zip(parts, parameters, strict=True)), "others may hold it"
    assert all(torch.equal(part.weight.float(), weight.float()) for part, weight in zip(parts, before, strict=True))
    parts[1].weight.data.zero_()
    assert not buffer[starts[1] : starts[1] + 8].float().any(), "a change of a layer is one of the buffer"


@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 1), (1, 4)])
def test_what_is_packed_is_found_and_nothing_is_copied(rows, columns):
    parts = layers(3, 8, 5)
    buffer = pack(parts, "weight", rows=rows, columns=columns)
    again = pack(parts, "weight", "cpu", rows=rows, columns=columns)
    assert again.data_ptr() == buffer.data_ptr() and again.shape == buffer.shape and again.stride() == buffer.stride()


def test_neighbours_within_a_larger_buffer_are_found_too():
    parts = layers(3, 8, 5)
    buffer = pack(parts, "weight")
    some = pack(parts[1:], "weight")
    assert some.data_ptr() == buffer[3:].data_ptr() and torch.equal(some, buffer[3:])


@pytest.mark.parametrize("change", ["order", "padding", "one of them elsewhere", "a gap"])
def test_what_is_packed_otherwise_is_packed_again(change):
    parts = layers(8, 8, 8)
    buffer, rows, columns = pack(parts, "weight"), 1, 1
    if change == "order":
        parts = parts[::-1]
    elif change == "padding":
        columns = 4
    elif change == "a gap":
        parts = [parts[0], parts[2]]
    else:
        parts[1].weight.data = parts[1].weight.data.clone()
    weights = [part.weight.data.clone() for part in parts]
    again = pack(parts, "weight", rows=rows, columns=columns)
    assert memory(again).isdisjoint(memory(buffer))
    assert torch.equal(again[:, :6], torch.cat(weights)) and not again[:, 6:].any()


def test_a_buffer_in_which_another_weight_has_the_place_of_the_padding_is_not_taken_for_a_padded_one():
    """(8, 4) of a (8, 8) buffer has the strides of a weight whose columns are padded to 8; the rest is not zeros."""
    whole, part = torch.ones(16, 8), nn.Linear(4, 8)
    part.weight.data = whole[:8, :4]
    buffer = pack([part], "weight", columns=8)
    assert not buffer[:, 4:].any() and torch.equal(buffer[:, :4], part.weight)


def test_biases_and_the_meta_device():
    parts = layers(3, 8, 5)
    biases = torch.cat([part.bias for part in parts])
    assert torch.equal(pack(parts, "bias"), biases)
    there = pack(parts, "bias", "meta")
    assert there.is_meta and there.shape == (16,) and all(part.bias.is_meta for part in parts)


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_quantised_layers_that_are_made_together_are_packed_from_the_start(kind):
    torch.manual_seed(0)
    made = kind.all_from_float([nn.Linear(32, n) for n in (16, 48)])
    before = memory(*(part.weight for part in made))
    whole = kind.merged(made)
    assert memory(whole.weight) == before and len(before) == 1
    assert torch.equal(whole(torch.ones(2, 32)), torch.cat([part(torch.ones(2, 32)) for part in made], 1))
