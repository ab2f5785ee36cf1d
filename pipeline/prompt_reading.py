"""A prompt and its pictures through the vision-language model: what `encode_prompt` of the pipeline does for a row."""

from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

from fast_path.watch import acts_as_a_whole, dtype_of
from pipeline import denoising, vision_language
from pipeline.images import Pictures, resample
from pipeline.stock_call import MAX_SIDE
from pipeline.whole import Whole


class PromptReading(Whole):
    """The inside of a pipeline's first step. Its results are cached under the state of what makes them."""

    def _embed(self, prompt: str, pictures: list[Pictures]) -> torch.Tensor:
        """One row: (1, L, D)."""

        def read(state: tuple) -> torch.Tensor:
            reader = self._reader(state)
            key = (*reader, self._dtype("transformer"), self.prompt_template_encode_start_idx, prompt)
            return self._cached("prompt_embeds", key, lambda: self._run_text_encoder(prompt, pictures, reader), *pictures)

        return self.fast_path.settled(self, "text_encoder", read)

    def _reader(self, state: tuple) -> tuple:
        """What reads prompts and pictures, for keys: it changes whenever its answers could. `state` is the text encoder's."""
        words, processor = self.tokenizer, getattr(self.processor, "image_processor", None)
        return (state, words, len(words), processor, self.prompt_template_encode, self._execution_device, stock.CONDITION_IMAGE_SIZE)

    def _run_text_encoder(self, prompt: str, pictures: list[Pictures], reader: tuple) -> torch.Tensor:
        if acts_as_a_whole(self.text_encoder):
            return self._run_whole_text_encoder(prompt, pictures).to(self._dtype("transformer"), copy=True)
        features = [self._picture_features(p, reader) for p in pictures]
        grids = tuple(grid for _, grid in features)
        encoder = self.text_encoder
        (words, rows), positions, places = self._cached(
            "prompt_tokens",
            (prompt, grids, *reader),
            lambda: self._words(prompt, grids),
        )
        # The language model under the vocabulary head; the head's 152k logits for each token would be thrown away.
        language_model = encoder.model.language_model
        embeds = words[rows].unsqueeze(0)  # (1, L, D)
        for (start, stop), (feature, _) in zip(places, features, strict=True):
            embeds[:, start:stop] = feature.to(embeds.dtype)
        start = self.prompt_template_encode_start_idx
        if self.fused_text_encoder is not None:
            hidden = self.fused_text_encoder.encode_text(embeds, positions, skip=start)
        else:
            hidden = language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
            hidden = hidden[:, start:]
        # A copy: a view would keep the dropped system prompt's rows alive in the cache.
        return hidden.to(self._dtype("transformer"), copy=True)

    def _run_whole_text_encoder(self, prompt: str, pictures: list[Pictures]) -> torch.Tensor:
        """Through the model's own forward, for hooks that wait for it: the vocabulary head costs a row more."""
        patches = [self._patches(picture) for picture in pictures]
        vision: Any = self.text_encoder.config.vision_config
        merge = vision.spatial_merge_size
        ids, positions, _ = self._tokenise(prompt, tuple((rows // merge, columns // merge) for _, (rows, columns) in patches))
        device, seen = self._execution_device, {}
        if pictures:
            seen["pixel_values"] = torch.cat([values for values, _ in patches])
            seen["image_grid_thw"] = torch.tensor([[1, *grid] for _, grid in patches]).to(device)
        said = self.text_encoder(
            input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False, output_hidden_states=True,
            logits_to_keep=1, **seen,
        )  # fmt: skip
        return said.hidden_states[-1][:, self.prompt_template_encode_start_idx :]

    def _picture_features(self, picture: Pictures, reader: tuple) -> tuple[torch.Tensor, vision_language.Grid]:
        """The vision tower's tokens (n, D) of one picture, and their rows and columns."""
        return self._cached("picture_features", reader, lambda: self._run_vision(picture), picture)

    def _patches(self, picture: Pictures) -> tuple[torch.Tensor, vision_language.Grid]:
        """A picture at the size that the model looks at, cut into patches; their rows and columns."""
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, picture.size[0] / picture.size[1])
        pixels = resample(picture.on(self._execution_device), width, height, "lanczos")
        return vision_language.pixel_values(pixels, self.processor.image_processor)

    def _run_vision(self, picture: Pictures) -> tuple[torch.Tensor, vision_language.Grid]:
        device, visual = self._execution_device, self.text_encoder.model.visual
        values, (rows, columns) = self._patches(picture)
        merged = rows // visual.spatial_merge_size, columns // visual.spatial_merge_size
        if self.fused_text_encoder is not None:
            return self.fused_text_encoder.encode_image(values.to(dtype_of(visual)), (rows, columns)), merged
        grid = self._constant(("grid", rows, columns, device), lambda: torch.tensor([[1, rows, columns]]).to(device))
        return visual(values.to(dtype_of(visual)), grid_thw=grid).pooler_output, merged

    def _tokenise(self, prompt: str, grids: tuple[vision_language.Grid, ...]):
        """Token ids (1, L), 3-D rotary positions (3, 1, L), and where each picture's tokens lie; on the CPU."""
        text = self.prompt_template_encode.format(vision_language.announce_pictures(len(grids)) + prompt)
        ids, positions, places = vision_language.layout(
            self.tokenizer(text, verbose=False)["input_ids"], self.text_encoder.config.image_token_id, grids
        )
        vision_language.check_length(
            len(ids) - self.prompt_template_encode_start_idx, sum(r * c for r, c in grids), self._most_tokens()
        )
        return torch.tensor([ids]), torch.tensor(positions).T[:, None], places

    def _most_tokens(self) -> int:
        """How many tokens of prompt and pictures the models can tell apart, at an output as large as is allowed.

        The transformer looks positions of text up in a table, behind those of the pictures; the vision-language model
        was made for a number of positions, its instructions among them.
        """
        skipped = self.prompt_template_encode_start_idx
        limits = [self.text_encoder.config.get_text_config().max_position_embeddings - skipped]
        if self.transformer is not None:
            limits.append(denoising.text_positions(self.transformer, [(1, MAX_SIDE // self._unit, MAX_SIDE // self._unit)]))
        return min(limits)

    def _words(self, prompt: str, grids: tuple[vision_language.Grid, ...]):
        """What `_tokenise` gives, on the device; in the ids' place their embeddings, see `vision_language.word_rows`."""
        ids, positions, places = self._tokenise(prompt, grids)
        words, device = self.text_encoder.model.language_model.embed_tokens, self._execution_device
        return vision_language.word_rows(words, ids[0].tolist(), device), positions.to(device), places
