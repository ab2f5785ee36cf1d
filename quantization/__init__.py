"""8-bit linear layers: int8 or e4m3 weights and activations, a scale for each output and each row.

    layer.py         the layer: its weights, its backends, and which of them runs (choices.py: measured on an H200)
    pair.py          two layers in one launch
    swap.py          into a model: which layers, in which groups, and a report
    folder.py        files: quantise a diffusers folder, save, load
    side_by_side.py  weights as views of one buffer
    rows.py          rows to 8 bits: the definition and the kernels
    products.py      the kernels of products by pointer and by TMA; overlapping.py: the one in Gluon
    tiles.py         configurations of those kernels, which fit where, and the order of tiles
    timing.py        microseconds in a CUDA graph
    languages.py     which Triton and Gluon are installed

`int8_linear` and `fp8_linear` add the number formats. Nothing here imports from the packages above it.
"""


class QuantizationError(ValueError):
    """A size, a layer or a folder that cannot be quantised or loaded; the text says what came and what is allowed."""
