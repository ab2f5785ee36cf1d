"""Weights as views of one buffer, so that one matrix product reads the weights of several layers.

Layers that read the same input are fewer and larger products as one. Their parameters are copied into one buffer and
become views of it: no weight is stored twice, the layers themselves still run, and a LoRA that changes their weights in
place changes the buffer.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn


def pack(
    modules: Sequence[nn.Module], name: str, device: torch.device | str | None = None, *, rows: int = 1, columns: int = 1
) -> torch.Tensor:
    """The parameters `name` of `modules`, (n, K) or (n,) each, one below the other in one contiguous buffer on `device`.

    Each parameter becomes a view of the buffer. `rows` and `columns` are the multiples to which each parameter is padded
    with zeros. If the parameters are such views already, their buffer is returned and nothing is copied or moved.
    """
    parameters: list[torch.Tensor] = [getattr(module, name) for module in modules]
    first = parameters[0]
    device = first.device if device is None else torch.device(device)
    starts = [0, *accumulate(round_up(len(parameter), rows) for parameter in parameters)]
    shape = (starts[-1], *(round_up(size, columns) for size in first.shape[1:]))
    buffer = _shared_buffer([parameter.data for parameter in parameters], starts, shape, device)
    if buffer is not None:
        return buffer
    make = first.data.new_zeros if _is_padded(parameters, shape) else first.data.new_empty
    buffer = make(shape, device=device)
    for module, parameter, start in zip(modules, parameters, starts, strict=False):
        view = buffer.narrow(0, start, len(parameter))
        view = view.narrow(1, 0, parameter.shape[1]) if view.dim() > 1 else view
        view.copy_(parameter.data)
        if view.is_meta == parameter.is_meta:
            parameter.data = view
        else:  # torch does not take a tensor of the meta device as another device's `.data`
            setattr(module, name, nn.Parameter(view, parameter.requires_grad))
    return buffer


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def _shared_buffer(
    tensors: list[torch.Tensor], starts: list[int], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """The buffer of `shape` of which the tensors are views from row `starts[i]` on; None if there is none on `device`."""
    first, strides = tensors[0], (*shape[1:], 1)
    if device.type != first.device.type or device.index not in (None, first.device.index):
        return None
    storage, base = first.untyped_storage(), first.storage_offset()
    for tensor, start in zip(tensors, starts, strict=False):
        same = tensor.untyped_storage()._cdata == storage._cdata and tensor.stride() == strides
        if not same or tensor.storage_offset() != base + start * strides[0]:
            return None
    # The padding is only known to be zeros in a storage that is this buffer and nothing else.
    if _is_padded(tensors, shape) and storage.nbytes() != math.prod(shape) * first.element_size():
        return None
    return first.as_strided(shape, strides, base)


def _is_padded(tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> bool:
    return math.prod(shape) != sum(tensor.numel() for tensor in tensors)
