"""What a text encoder has to be for `text_encoder` to run it: classes, settings and weights whose arithmetic is written there.

Each function raises UnsupportedError, whose text goes into the fast path's report; then the stock modules run.
"""

from typing import Any

from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from fast_path.unsupported import UnsupportedError
from fast_path.watch import foreign
from quantization.layer import QuantizedLinear

# Modules of the classes whose arithmetic is known: a quantised or adapted layer comes from another one.
_KNOWN_HOMES = (Qwen2_5_VLForConditionalGeneration.__module__, "transformers.activations")


def check(text_encoder: nn.Module) -> None:
    """Raises UnsupportedError unless this is a plain, loaded Qwen2.5-VL, all of it on one device in one dtype."""
    if type(text_encoder) is not Qwen2_5_VLForConditionalGeneration:
        raise UnsupportedError(
            f"a {type(text_encoder).__name__} is not known here, only Qwen2_5_VLForConditionalGeneration"
        )
    for name, module in text_encoder.named_modules():
        home = type(module).__module__
        known = home in _KNOWN_HOMES or home.startswith("torch.nn.modules.") or isinstance(module, QuantizedLinear)
        if not known and not hasattr(module, "base_layer"):
            raise UnsupportedError(f"{name} is a {type(module).__name__}, which is not known here")
    if reason := foreign(text_encoder):
        raise UnsupportedError(reason)
    kinds, language_model = set(), text_encoder.model.language_model
    for module in text_encoder.modules():
        if module is text_encoder.lm_head:
            continue
        for parameter in module.parameters(recurse=False):
            if isinstance(module, QuantizedLinear) and parameter is not module.bias:
                kinds.add((str(parameter.device), str(module.dtype)))
                continue
            anywhere = module is language_model.embed_tokens  # see `FusedTextEncoder.unread`
            device = (language_model.norm.weight if anywhere else parameter).device
            kinds.add((str(device), str(parameter.dtype)))
    if len(kinds) != 1:
        raise UnsupportedError(f"the weights are not all of one kind: {sorted(kinds)}")


def check_towers(visual: Any, language_model: Any) -> None:
    """The settings under which the arithmetic here is the towers'. Raises UnsupportedError."""
    patches = visual.patch_embed.proj
    if patches.kernel_size != patches.stride or any(patches.padding) or patches.groups != 1:
        raise UnsupportedError(
            "the patch embedding's kernel is not its stride: not known here as one multiplication"
        )
    if any(layer.self_attn.sliding_window is not None for layer in language_model.layers):
        raise UnsupportedError("the language model attends within a sliding window, which is not known here")
    if language_model.rotary_emb.rope_type != "default":
        raise UnsupportedError(f'the rotary positions are "{language_model.rotary_emb.rope_type}", not "default"')


def check_alike(linears: list) -> None:
    """Raises UnsupportedError if layers of one input cannot be one layer."""
    if len({linear.input_format if isinstance(linear, QuantizedLinear) else None for linear in linears}) > 1:
        raise UnsupportedError(f"layers of one input are quantised in different ways: {linears}")
