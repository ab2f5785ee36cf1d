"""Exact accelerations of the loaded modules: the same numbers, less work.

`apply(pipeline)` puts in what fits the loaded model and says, entry by entry, what it did and why; `remove(pipeline)`
takes everything out again, so the stock path stays reachable for comparison. Nothing here approximates: what a test
can tell apart from stock is rounding only.
"""

from typing import NamedTuple

from fast_path.vae import SingleFrameVAE, single_frame_vae

__all__ = ["Applied", "SingleFrameVAE", "apply", "remove", "single_frame_vae"]


class Applied(NamedTuple):
    """One line of the report: what was tried, whether it is in use, and why (or why not)."""

    name: str
    applied: bool
    reason: str


def apply(pipeline) -> list[Applied]:
    """Puts every acceleration in that fits `pipeline`; sets `pipeline.single_frame_vae`. Call after `.to(device)`."""
    report = []
    try:
        if hasattr(pipeline.vae, "_hf_hook"):
            raise TypeError("the VAE is offloaded: its copy would stay behind")
        pipeline.single_frame_vae = single_frame_vae(pipeline.vae)
        report.append(Applied("single_frame_vae", True, "2-D convolutions, channels last; the temporal past is zeros"))
    except TypeError as error:
        report.append(Applied("single_frame_vae", False, str(error)))
    return report


def remove(pipeline) -> None:
    """Back to the stock modules."""
    pipeline.single_frame_vae = None
