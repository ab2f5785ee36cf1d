"""Which Triton and which Gluon are installed, under one set of names.

A CPU build of torch comes without Triton. Gluon, its language of explicit layouts and barriers, came with Triton 3.4 and
is young: two of its functions have other names in 3.6 than in 3.9. Whatever is missing here is None, so kernels are
defined under `if triton is not None:` or `if gluon is not None:`.
"""

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:
    gluon = gl = hopper = mbarrier = GluonDescriptor = barrier = begin_load = None
else:
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    begin_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

__all__ = ["GluonDescriptor", "TensorDescriptor", "barrier", "begin_load", "gl", "gluon", "hopper", "mbarrier", "tl", "triton"]
