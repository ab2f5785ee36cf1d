"""LoRA files as trainers write them, made for a transformer's own layers."""

import torch
from safetensors.torch import save_file

LORA_LINEARS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip


def lora_pairs(transformer, rank=4, seed=0, linears=LORA_LINEARS, blocks=None) -> dict:
    """{layer: (down (rank, in), up (out, rank))} for Linears of each block, or of the first `blocks`."""
    random, pairs = torch.Generator().manual_seed(seed), {}
    for block in range(blocks or len(transformer.transformer_blocks)):
        for linear in linears:
            name = f"transformer_blocks.{block}.{linear}"
            out_features, in_features = transformer.get_submodule(name).weight.shape
            down = torch.randn(rank, in_features, generator=random) * 0.05
            pairs[name] = down, torch.randn(out_features, rank, generator=random) * 0.05
    return pairs


def lightning_keys(pairs, alpha=8.0) -> dict:
    """Keys of the Lightning files: bare names, `lora_down`, `lora_up` and an alpha for each layer."""
    state = {}
    for name, (down, up) in pairs.items():
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return state


def write_lora(path, transformer, rank=4, alpha=8.0, seed=0) -> dict:
    """A LoRA over the 12 Linears of each block in Lightning's keys; returns the change W gets at weight 1, by parameter."""
    pairs = lora_pairs(transformer, rank, seed)
    save_file(lightning_keys(pairs, alpha), path)
    return {f"{name}.weight": alpha / rank * up @ down for name, (down, up) in pairs.items()}
