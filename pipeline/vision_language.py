"""What the vision-language model is fed: patches of the pictures, token ids, and 3-D rotary positions.

transformers' processor does this with PIL on the CPU (32 ms a frame on a server's core), wants torchvision for videos
that no one sends, and leaves the positions to the model, which computes them only if it is told which tokens are
pictures (`mm_token_type_ids`): diffusers does not tell it (diffusers issue 14194), and the model then reads the picture
as a line of text, without any error. Everything here follows from the layout, which the host knows: nothing asks the
GPU a question. Patch, merge and size limits come from the image processor's config; 14 and 28 are nowhere assumed.
"""

import functools

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from pipeline.images import EditError, resample
from pipeline.picture_files import named

Grid = tuple[int, int]  # (rows, columns)


def pixel_values(pixels: torch.Tensor, processor) -> tuple[torch.Tensor, Grid]:
    """A picture, uint8 (1, H, W, 3), as patches, float32 (rows * columns, C * T * P * P), on its own device.

    Equal to Qwen2VLImageProcessor's `pixel_values` (bicubic to a multiple of patch * merge, then mean and deviation).
    """
    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    height, width = smart_resize(
        pixels.shape[1], pixels.shape[2], patch * merge, processor.size["shortest_edge"], processor.size["longest_edge"]
    )
    pixels = resample(pixels, width, height, "bicubic")
    mean, std = _statistics(tuple(processor.image_mean), tuple(processor.image_std), pixels.device)
    values = (pixels[0] * processor.rescale_factor - mean) / std  # (H, W, C)
    rows, columns = height // patch, width // patch
    # Patches come in blocks of merge x merge, so that the merger finds its neighbours side by side.
    blocks = values.view(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5)  # (rows/m, columns/m, m, m, C, P, P)
    blocks = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, frames, -1, -1)  # a still picture is all of its frames
    return blocks.reshape(rows * columns, -1), (rows, columns)


def announce_pictures(count: int) -> str:
    """The words that Qwen-Image-Edit was trained to see before the instruction."""
    return "".join(f"Picture {n}: <|vision_start|><|image_pad|><|vision_end|>" for n in range(1, count + 1))


def prompts(prompt, may_be_empty: bool) -> list[str]:
    """The prompt as a list of texts. A negative prompt may be empty; what asks for an edit may not."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(p, str) for p in texts):
        raise EditError(f"The prompt is {named(prompt)}. Allowed: a text, or a list of texts.")
    if not may_be_empty and not all(p.strip() for p in texts):
        raise EditError("The prompt is empty. Say what to change in the picture.")
    return list(texts)


def check_length(length: int, pictures: int, most: int) -> None:
    """EditError if a prompt of `length` tokens, `pictures` of them the pictures' own, is longer than the model's `most`."""
    if length > most:
        seen = f", {pictures} of them for the pictures" if pictures else ""
        raise EditError(f"The prompt is too long: it has {length} tokens{seen}. Allowed: {most}.")


def layout(
    ids: list[int], image_id: int, grids: tuple[Grid, ...]
) -> tuple[list[int], list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Token ids with each picture's placeholder spread over its tokens; their positions; where each picture lies.

    `ids` holds one `image_id` for each picture, `grids` the pictures' sizes in tokens after merging. A position is
    (time, row, column): three equal numbers counting on for text; for a picture its rows and columns counted from
    where it begins, and the text behind it goes on after the longer side (Qwen2-VL, section 2.1: M-RoPE).
    Raises EditError if the person's words contain a placeholder.
    """
    if ids.count(image_id) != len(grids):
        raise EditError("The prompt contains <|image_pad|>, which stands for a picture. Leave it out.")
    spread, positions, places, position, waiting = [], [], [], 0, iter(grids)
    for token in ids:
        if token != image_id:
            spread.append(token)
            positions.append((position, position, position))
            position += 1
            continue
        rows, columns = next(waiting)
        places.append((len(spread), len(spread) + rows * columns))
        spread += [image_id] * (rows * columns)
        positions += [(position, position + r, position + c) for r in range(rows) for c in range(columns)]
        position += max(rows, columns)
    return spread, positions, places


def word_rows(words: torch.nn.Embedding, ids: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A text's own small word table (U, D) and, of each of its tokens, the row in it, int64 (L,); both on `device`.

    `table[rows]` is `words(ids)` to the bit. The model's table of a gigabyte is only ever read for some hundred words a
    prompt: they are looked up where it lies, which may be the CPU, and only they are brought over.
    """
    place = {word: row for row, word in enumerate(dict.fromkeys(ids))}
    # On the meta device lies what an offloading hook will bring to the pipeline's device when it is called.
    home = device if words.weight.is_meta else words.weight.device
    table, rows = words(torch.tensor(list(place), device=home)), torch.tensor([place[word] for word in ids])
    if device.type == "cuda":
        table, rows = (t if t.is_cuda else t.pin_memory() for t in (table, rows))
    return table.to(device, non_blocking=True), rows.to(device, non_blocking=True)


def pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (1, L_i, D) as one (B, max L, D), zeros behind, and the mask (B, max L) of what is not; None if all is."""
    lengths = [row.shape[1] for row in rows]
    if len(rows) == 1:
        return rows[0], None
    if len(set(lengths)) == 1:
        return torch.cat(rows), None
    longest = max(lengths)
    padded = torch.cat([torch.nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
    positions = torch.arange(longest, device=padded.device)
    return padded, (positions < torch.tensor(lengths, device=padded.device)[:, None]).long()


def unpad(embeds: torch.Tensor, mask: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Padded prompts one by one: (its place in the batch, (1, L_i, D)). Padding is behind the words, as `pad` puts it."""
    lengths = mask.sum(1).tolist()
    return [(slice(b, b + 1), embeds[b : b + 1, :length]) for b, length in enumerate(lengths)]


@functools.lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)
