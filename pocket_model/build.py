"""The pocket model's anatomy: Qwen-Image-Edit's own classes at a size that a laptop runs.

Everything that is *shape* is here (configs, tokenizer, processor and scheduler files); everything that is *learned* is in
`train.py`. The folder that `save_folder` writes is an ordinary diffusers folder: stock `QwenImageEditPlusPipeline` and
ours load it through the code path of the 20 B model.

Where the sizes come from:
- 48 MB of 16-bit weights are 24 M parameters; the transformer gets 60 % of them, the VAE 20 %, the encoder the rest.
- The vision tower cuts 32-pixel patches and merges 2x2 (the real one: 14), so that a 384x384 condition picture is
  6x6 = 36 tokens instead of 196: on a CPU the text stream would otherwise cost as much as the picture.
- Latents keep the real layout: 8x smaller, 16 channels, packed 2x2 into 64.
- Every word of Qwen's system prompt is one token, as with the real tokenizer, so the prefix that the pipeline drops is
  64 tokens here too (`prompt_template_encode_start_idx`).
"""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from pocket_model.edits import EDITS

VOCABULARY = 2560
PATCH, MERGE = 32, 2
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

VAE_CONFIG = {"base_dim": 24, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
TRANSFORMER_CONFIG = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 192,
    "axes_dims_rope": [16, 24, 24],
}
# Lightning's schedule: sigmas 1 -> [1, 0], 2 -> [1, .75, 0], 4 -> [1, .9, .75, .5, 0].
SCHEDULER_CONFIG = {
    "base_image_seq_len": 256,
    "base_shift": 1.0986122886681098,
    "max_image_seq_len": 8192,
    "max_shift": 1.0986122886681098,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# What people write around the edits themselves; gives the byte-pair merges some English to stand on.
COMMON_WORDS = """a the this that my me him her it them photo picture image pic frame camera video portrait face person man
woman child cat dog animal tree sky sea mountain city street house flower food car please now just really very more less
make turn change convert transform render draw paint show give apply add put place remove keep leave into like as with
without of in on at to from for and or not style effect filter look looks look like version old new big small bright
dark light soft hard strong warm cold red orange yellow green cyan blue purple pink white black gray grey brown gold
silver navy teal magenta left right top bottom upper lower corner side half both two first second background colour
color colours colors tone tones shadow shadows highlight contrast saturation can you could would want need i""".split()


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of `VOCABULARY` entries in Qwen2's form, learned from the edits' phrasings and Qwen's template."""
    template = re.split("|".join(map(re.escape, SPECIAL_TOKENS)), template_prefix())
    phrasings = [p for edit in EDITS for p in edit.phrasings]
    corpus = template * 200 + ["Picture 1: \nassistant\n Picture 2: Picture 3:"] * 200
    corpus += [text for p in phrasings for text in (p, " " + p, p.lower(), " " + p.lower())]
    corpus += [f"{word} {word.capitalize()}" for word in COMMON_WORDS] * 3
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        model_max_length=4096,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    prefix = len(tokenizer(template_prefix())["input_ids"])
    assert prefix == 64, f"the system prefix has {prefix} tokens, the pipeline drops 64"
    return tokenizer


def template_prefix() -> str:
    """Qwen-Image-Edit's prompt template up to the place of the user's words (from the stock pipeline itself)."""
    probe = object.__new__(QwenImageEditPlusPipeline)
    # Only the attribute is wanted; the constructor sets it after registering the modules, so give it none to register.
    probe.register_modules = lambda **modules: probe.__dict__.update(modules)
    QwenImageEditPlusPipeline.__init__(probe, None, None, None, None, None, None)
    return probe.prompt_template_encode.split("{}")[0]


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 4 M parameters, hidden size 192, with random weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 8 * PATCH * MERGE,
        "fullatt_block_indexes": [0, 1],
        "out_hidden_size": text["hidden_size"],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None):
    """The VAE with random weights; the latent statistics come from training (zeros and ones before it)."""
    z = VAE_CONFIG["z_dim"]
    return AutoencoderKLQwenImage(
        **VAE_CONFIG, latents_mean=latents_mean or [0.0] * z, latents_std=latents_std or [1.0] * z
    )


def build_transformer() -> QwenImageTransformer2DModel:
    """The transformer with random weights; its output layer starts at zero, as diffusion transformers do."""
    transformer = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def save_folder(folder: Path, vae, text_encoder, transformer, tokenizer, dtype=torch.float16) -> None:
    """Writes a complete diffusers folder; the weights are rounded to `dtype` on the way out (the modules are changed)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vae.to(dtype).save_pretrained(folder / "vae")
    transformer.to(dtype).save_pretrained(folder / "transformer")
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    preprocessing = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2VLProcessor",
        "merge_size": MERGE,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 1024 * 1024},
    }
    _write(folder / "processor" / "preprocessor_config.json", preprocessing)
    _write(
        folder / "processor" / "video_preprocessor_config.json",
        preprocessing | {"video_processor_type": "Qwen2VLVideoProcessor"},
    )
    _write(
        folder / "model_index.json",
        {
            "_class_name": "QwenImageEditPlusPipeline",
            "_diffusers_version": "0.42.1",
            "processor": ["transformers", "Qwen2VLProcessor"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
