"""What the parts of the pipeline's class (`stock_call`, `prompt_reading`) find in the whole one.

For readers and type checkers: `cached_pipeline` defines it, and at run time `Whole` is empty.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor

    import fast_path
    from pipeline.denoising import References
    from pipeline.images import Pictures
    from pipeline.sampling import Schedule

    class Whole(QwenImageEditPlusPipeline):
        transformer: QwenImageTransformer2DModel
        text_encoder: Qwen2_5_VLForConditionalGeneration
        tokenizer: Qwen2Tokenizer
        processor: Qwen2VLProcessor
        fast_path: "fast_path.FastPath"
        fused_text_encoder: "fast_path.FusedTextEncoder | None"
        denoise: Callable[..., torch.Tensor]

        def encode_references(
            self, images: Any, *, area: int | str | None = None, width: int | None = None, height: int | None = None
        ) -> References: ...

        def schedule(
            self, steps: int, width: int, height: int, sigmas: Sequence[float] | None = None
        ) -> Schedule: ...

        def initial_noise(self, width: int, height: int, seed: Any = 0, batch: int = 1) -> torch.Tensor: ...

        def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor: ...

        def _decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor: ...

        def encode_prompt(
            self,
            prompt: Any,
            image: Any = None,
            device: torch.device | None = None,
            num_images_per_prompt: int = 1,
            prompt_embeds: torch.Tensor | None = None,
            prompt_embeds_mask: torch.Tensor | None = None,
            max_sequence_length: int = 1024,
        ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

        def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any: ...

        @staticmethod
        def open_references(images: Any, most: int | None = 3) -> list[Pictures]: ...

        def _cached(self, name: str, key: tuple, make: Callable[[], Any], *pictures: Pictures) -> Any: ...

        def _constant(self, key: Any, make: Callable[[], Any]) -> Any: ...

        def _dtype(self, component: str) -> torch.dtype: ...

        def _check_size(self, width: Any, height: Any) -> None: ...

        def _grid(self, width: int, height: int) -> tuple[int, int]: ...

        @property
        def default_size(self) -> int: ...

        @property
        def _unit(self) -> int: ...

        @property
        def _execution_device(self) -> torch.device: ...

else:

    class Whole:
        """Nothing at run time."""
