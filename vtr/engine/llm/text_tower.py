"""The question as a CLIP text tower sees it, for methods whose relevance is CLIP's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtr.engine.llm.prompt import Prompt
from vtr.types import TextEmbedding, VtrError
from vtr.types.errors import WrongValue


class Questions:
    """Where the text of the questions comes from: given as strings, or decoded from the prompt.

    Args:
        question: one for every prompt row, or a list with one per row.
        processor: processor or tokenizer of the model; decodes the text behind the first image, template words included.
    """

    def __init__(self, question: str | Sequence[str] | None = None, processor: Any = None) -> None:
        self.question = [question] if isinstance(question, str) else question
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def of(self, prompt: Prompt) -> list[str]:
        """Returns the question of every prompt row of a prompt (beams included); reads the ids of the prompt on the host, once.

        Raises:
            ValueError: as many questions as rows are needed, or there are no ids to decode.
        """
        rows = len(prompt.instruction)
        if self.question is not None:
            if rows % len(self.question) or (len(self.question) > 1 and rows // len(self.question) != prompt.expand):
                raise WrongValue(
                    f"vtr: question must hold one string per prompt, got {len(self.question)} for {rows // prompt.expand} prompts"
                )
            return [one for one in self.question for _ in range(rows // len(self.question))]
        if prompt.ids is None:
            raise WrongValue("vtr: inputs_embeds hold no text that a processor could decode; give question= instead")
        ids, asked = prompt.ids.tolist(), prompt.instruction.tolist()
        texts = [[i for i, wanted in zip(*row, strict=True) if wanted] for row in zip(ids, asked, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(texts, skip_special_tokens=True)]


class TextTower:
    """Text tower and joint space of a CLIP checkpoint, loaded when the first question comes.

    Args:
        source: hub id or local folder of a whole CLIP model with its tokenizer.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.known: dict[str, Tensor] = {}

    @cached_property
    def model(self) -> Any:
        """Loaded when the first question comes: applying, checking and planning need no weights."""
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(self.source, dtype=torch.float32).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the same checkpoint."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source)

    def segments(self, question: str) -> Tensor:
        """Token ids `(M, T)`: the question cut into pieces that fit the tower, each between its own BOS and EOS, padded with EOS."""
        config = self.model.config.text_config
        size = config.max_position_embeddings - 2
        ids = self.tokenizer(question, add_special_tokens=False, truncation=False)["input_ids"]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pieces = [[first, *ids[at : at + size], last] for at in range(0, max(len(ids), 1), size)]
        longest = max(map(len, pieces))
        return torch.tensor([piece + [last] * (longest - len(piece)) for piece in pieces])

    @torch.no_grad()
    def embed(self, questions: list[str], row: Tensor) -> TextEmbedding:
        """Embeds one question per prompt row for the groups whose rows are `row (G,)`; a question is embedded once.

        Raises:
            VtrError: (by `joint`) the features are not those of this checkpoint's vision tower.
        """
        device = row.device
        self.model.to(device)
        for question in {q for q in questions if q not in self.known}:
            out = self.model.get_text_features(input_ids=self.segments(question).to(device))
            self.known[question] = getattr(out, "pooler_output", out)
        found = [self.known[q].to(device) for q in questions]
        real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(f), dtype=torch.bool) for f in found], batch_first=True).to(device)
        return TextEmbedding(torch.nn.utils.rnn.pad_sequence(found, batch_first=True)[row], real[row], self.joint)

    @torch.no_grad()
    def joint(self, features: Tensor) -> Tensor:
        """Patch features of the vision tower `(..., D)` in the joint space `(..., C)`, as CLIP does with CLS."""
        vision, projection = self.model.vision_model, self.model.visual_projection
        if features.shape[-1] != projection.in_features:
            raise VtrError(
                f"text_tower: {self.source!r} belongs to a vision tower of width {projection.in_features}, this model's features have "
                f"{features.shape[-1]}; give the CLIP checkpoint that the model's vision tower comes from"
            )
        return projection(vision.post_layernorm(features.float()))
