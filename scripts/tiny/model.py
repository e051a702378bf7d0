"""Sizes of the embedded checkpoints, the supervised tower and the packed forward pass they are trained with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vtr.data.glyphs import ALPHABET
from vtr.data.questions import MOST_COUNTED
from vtr.data.scenes import COLORS, SHAPES, SIGNS, SIZES

from .tokenizer import PATCH, PINPOINTS, PIXELS

GRID = PIXELS // PATCH  # 24 x 24 patches
KINDS = len(SHAPES) * len(SIZES)
LONGEST = 5  # characters on a sign
HEADS = {"kind": KINDS + 1, "color": len(COLORS) + len(SIGNS) + 1, "char": len(ALPHABET) + 1, "index": LONGEST + 1, "center": 2}
NOTHING_WEIGHT = {"kind": 0.15, "color": 0.15, "char": 0.1, "index": 0.1, "center": 0.1}  # most patches show nothing
LOSS_WEIGHT = {"char": 2}  # the slowest to learn
PRESENT = len(SHAPES) * len(COLORS) + len(ALPHABET)
CONTEXT = {"word": (LONGEST, len(ALPHABET) + 1), "alike": (2, MOST_COUNTED + 2)}  # labels a patch, classes a label


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; the LLM reads the tower one layer before its last."""

    width: int = 128
    tower_layers: int = 6
    llm_layers: int = 6
    heads: int = 4
    intermediate: int = 352


FULL_SIZES = Sizes()


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the tokens that pad, begin and end, as configurations name them."""
    return dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


def tower_config(sizes: Sizes, pixels: int) -> CLIPVisionConfig:
    """The tower of both models, for square images of so many pixels a side."""
    return CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.heads,
        image_size=pixels,
        patch_size=PATCH,
        hidden_act="gelu_pytorch_tanh",
        projection_dim=sizes.width,
    )


def llm_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> LlamaConfig:
    """The LLM of both models."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.llm_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )


def build_model(tokenizer: PreTrainedTokenizerFast, sizes: Sizes = FULL_SIZES, next_: bool = False):
    """A LLaVA (or LLaVA-NeXT) with random weights."""
    ids = special_ids(tokenizer)
    settings = dict(
        vision_config=tower_config(sizes, PIXELS),
        text_config=llm_config(tokenizer, sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
        **ids,
    )
    if next_:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **settings))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    with torch.no_grad():  # words as large as visual tokens; with the usual 0.02 their identity drowns in the first layer's output
        model.get_input_embeddings().weight.normal_()
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(std=sizes.width**-0.5)
    model.generation_config.update(max_new_tokens=16, do_sample=False, **ids)
    return model


class Supervision(nn.Module):
    """Training-only heads: what every patch shows, where its object is, and what the picture holds (from CLS).

    `CONTEXT` has what a patch of an object knows beyond itself, so that any of an object's patches will do for an answer: the whole
    word of its sign, and how many items have its shape and its color.
    """

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})
        self.context = nn.ModuleDict({name: nn.Linear(width, labels * classes) for name, (labels, classes) in CONTEXT.items()})
        self.place = nn.Linear(width, 2)
        self.present = nn.Linear(width, PRESENT)
        self.spot = nn.Linear(width, 2)

    def named(self, middle: Tensor, spots: Tensor) -> Tensor:
        """Loss of saying, inside the LLM and where a question names an object, where that object is.

        Args:
            middle: hidden states of the text `(B, T, D)`.
            spots: where the object named at a token is `(B, T, 2)`, NaN at tokens that end no name.
        """
        known = ~spots.isnan().any(-1)
        return (self.spot(middle[known]).float() - spots[known]).abs().sum() / (2 * known.sum()).clamp(min=1)

    def forward(self, features: Tensor, cls: Tensor | None, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of patch features `(B, P, D)` and of CLS `(B, D)`, and the accuracy on patches that show something."""
        loss, scores = features.new_zeros((), dtype=torch.float32), {}
        for name, head in self.patch.items():
            logits, target = head(features).float(), labels[name]
            weight = torch.ones(logits.shape[-1], device=logits.device)
            weight[0] = NOTHING_WEIGHT[name]
            loss = loss + LOSS_WEIGHT.get(name, 1) * F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)
            shown = target > 0
            scores[name] = float((logits.argmax(-1) == target)[shown].float().mean())
        for name, head in self.context.items():
            target = labels[name]  # (B, P, labels)
            known = target >= 0
            logits = head(features).float().unflatten(-1, CONTEXT[name])[known]
            loss = loss + F.cross_entropy(logits, target[known], reduction="sum") / known.sum().clamp(min=1)
            scores[name] = float((logits.argmax(-1) == target[known]).float().mean())
        shown = labels["color"] > 0
        away = (self.place(features).float() - labels["place"]).abs()[shown].mean()
        scores["place"] = float(away.detach())
        loss = loss + 4 * away
        if cls is not None:
            loss = loss + 4 * F.binary_cross_entropy_with_logits(self.present(cls).float(), labels["present"])
        return loss, scores


def take(values: Tensor, kept: Tensor) -> Tensor:
    """Returns the rows `kept` `(B, K)` of `values` `(B, P, ...)`."""
    return values[torch.arange(len(values), device=values.device)[:, None], kept]


def tower_pass(tower: CLIPVisionModel, pixels: Tensor, where: Tensor, with_cls: bool, kept: Tensor | None = None):
    """Runs the tower on windows of a picture.

    Args:
        tower: the CLIP tower.
        pixels: `(B, 3, h, w)` normalised.
        where: raster index of every patch in the whole picture's grid `(B, P)`, see `grid_positions`.
        with_cls: also run the last layer, which only CLS needs.
        kept: patches that the tower sees `(B, K)`, or None for all.

    Returns:
        Features before the last layer, without CLS `(B, K, D)`, and CLS after the last layer `(B, D)` or None.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
    patches = patches + embeddings.position_embedding(where + 1)
    if kept is not None:
        patches = take(patches, kept)
    first = (embeddings.class_embedding + embeddings.position_embedding.weight[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, patches], dim=1))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    cls = tower.post_layernorm(tower.encoder.layers[-1](hidden, attention_mask=None)[:, 0]) if with_cls else None
    return hidden[:, 1:], cls


def grid_positions(corner: Tensor, rows: int, cols: int) -> Tensor:
    """Raster indices `(B, rows * cols)` in the whole grid of windows that start at `corner` `(B, 2)`."""
    row = corner[:, :1] + torch.arange(rows, device=corner.device)
    col = corner[:, 1:] + torch.arange(cols, device=corner.device)
    return (row[:, :, None] * GRID + col[:, None]).flatten(1)


def anyres_layout(tokens: Tensor, newline: Tensor) -> Tensor:
    """Orders projected tokens of thumbnail and 2 x 2 crops as LLaVA-NeXT does for a square image.

    Args:
        tokens: `(B, 5, N, D)`, the thumbnail first, crops in raster order.
        newline: learned newline token `(D,)`.

    Returns:
        `(B, N + 2 * side * (2 * side + 1), D)` where `side` is the tower's grid: the thumbnail, then rows across the crops.
    """
    batch, _, count, width = tokens.shape
    side = int(count**0.5)
    crops = tokens[:, 1:].reshape(batch, 2, 2, side, side, width).transpose(2, 3).reshape(batch, 2 * side, 2 * side, width)
    rows = torch.cat([crops, newline.to(crops.dtype).expand(batch, 2 * side, 1, -1)], dim=2)
    return torch.cat([tokens[:, 0], rows.flatten(1, 2)], dim=1)


def packed_pass(model, visual: Tensor | None, visual_positions: Tensor | None, text: dict[str, Tensor]):
    """Runs the LLM on several questions about each image in one sequence; no question sees another.

    Args:
        model: the LLaVA or Qwen2.5-VL.
        visual: projected visual tokens `(B, K, D)`, or None for no image.
        visual_positions: position ids `(B, K)`, or `(3, B, K)` for M-RoPE.
        text: `ids`, `offset` (position inside its question), `question` (1-based, 0 for padding) and `target` (-100 where
            there is nothing to predict), each `(B, T)`; `head` and `tail`, ids before and after the image; `start`, the position of
            the first token after the image `(B,)`.

    Returns:
        The output of the LLM with all hidden states, and how many tokens come before the first question.
    """
    llm, embed = model.model.language_model, model.get_input_embeddings()
    batch, device = len(text["ids"]), text["ids"].device
    head, tail = text["head"].expand(batch, -1), text["tail"].expand(batch, -1)
    after = text["start"][:, None] + torch.arange(tail.shape[1], device=device)
    parts, positions = [embed(head)], [torch.arange(head.shape[1], device=device).expand(batch, -1)]
    if visual is not None and visual_positions is not None:
        parts.append(visual.to(parts[0].dtype))
        positions.append(visual_positions)
    parts.append(embed(tail))
    shared = sum(part.shape[1] for part in parts)
    parts.append(embed(text["ids"]))
    positions += [after, text["offset"] + text["start"][:, None] + tail.shape[1]]
    if visual_positions is not None and visual_positions.ndim == 3:
        positions = [where if where.ndim == 3 else where.expand(3, -1, -1) for where in positions]
    question = F.pad(text["question"], (shared, 0))  # (B, S)
    real = F.pad(text["question"] > 0, (shared, 0), value=True)
    seen = (question[:, None] == 0) | (question[:, None] == question[:, :, None])  # (B, S, S)
    seen &= real[:, None] & torch.ones(seen.shape[1:], dtype=torch.bool, device=device).tril()
    seen |= torch.eye(seen.shape[1], dtype=torch.bool, device=device)  # padding sees itself
    tokens = torch.cat(parts, 1)
    mask = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, torch.finfo(tokens.dtype).min)[:, None]
    where = torch.cat(positions, -1)
    return llm(inputs_embeds=tokens, attention_mask=mask, position_ids=where, use_cache=False, output_hidden_states=True), shared


def llm_pass(model, visual: Tensor | None, visual_positions: Tensor | None, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Answers several questions about each image, see `packed_pass`.

    Returns:
        Logits at the positions that have a target `(M, V)`, and the hidden states of the text at two thirds of the LLM's depth `(B, T, D)`.
    """
    out, shared = packed_pass(model, visual, visual_positions, text)
    return packed_answers(model, out, shared, text)


def packed_answers(model, out, shared: int, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns what `llm_pass` does, from what `packed_pass` gives."""
    middle = out.hidden_states[len(model.model.language_model.layers) * 2 // 3][:, shared:]
    return model.lm_head(out.last_hidden_state[:, shared:][text["target"] >= 0]), middle
