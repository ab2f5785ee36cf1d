"""8-bit linear layers: the layer, its kernels, and which of them is fastest on an H200."""
