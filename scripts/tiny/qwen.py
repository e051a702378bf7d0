"""The Qwen2.5-VL among the embedded checkpoints: sizes, a start from the weights of tiny-llava, and the pass of its tower in training.

What tiny-llava's CLIP tower and Llama know fits in part. A layer norm is an RMS norm where nothing but centred vectors is written to the
residual stream; its bias goes into the next linear layer. A gated MLP whose second branch is 1 is a plain one (SiLU of 1.702 x stands
for GELU of x). The merger starts as tiny-llava's projector and the mean over 2 x 2 patches. CLS and learned positions have no
counterpart: a first block in the tower and a first layer in the LLM, which begin as next to nothing, have to make up for them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from .tokenizer import IMAGE_PAD, MERGE, PATCH, VIDEO_PAD, VISION_END, VISION_START

WINDOW = 48  # pixels: 3 x 3 visual tokens
MROPE = [1, 2, 13]  # pairs of dimensions that turn with time, row and column; the slow ones are left to the column and hardly turn
QUICK = 1.702  # SiLU(1.702 x) / 1.702 is close to GELU(x)


@dataclass(frozen=True)
class QwenSizes:
    """Widths and depths; one block and one layer more than what tiny-llava has to give."""

    width: int = 128
    tower_layers: int = 6
    llm_layers: int = 7
    heads: int = 4
    tower_intermediate: int = 512
    intermediate: int = 352
    full: tuple[int, ...] = (1, 3, 5)  # blocks of the tower that attend to the whole image
    mrope: tuple[int, ...] = tuple(MROPE)


FULL_SIZES = QwenSizes()


def build_qwen(tokenizer: PreTrainedTokenizerFast, sizes: QwenSizes = FULL_SIZES) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights."""
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    tower = dict(
        depth=sizes.tower_layers,
        hidden_size=sizes.width,
        intermediate_size=sizes.tower_intermediate,
        num_heads=sizes.heads,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        window_size=WINDOW,
        fullatt_block_indexes=list(sizes.full),
        out_hidden_size=sizes.width,
    )
    llm = dict(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.llm_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes.mrope)},
        **ids,
    )
    names = dict(image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen2_5_VLConfig(vision_config=tower, text_config=llm, tie_word_embeddings=False, **special)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        for name, weight in model.model.named_parameters():
            if weight.ndim == 2 and not name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "embed_tokens.weight")):
                weight.normal_(std=weight.shape[1] ** -0.5)
    model.generation_config.update(max_new_tokens=16, do_sample=False, **ids)
    return model


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(0, keepdim=True)


@torch.no_grad()
def start_from(model: Qwen2_5_VLForConditionalGeneration, llava, pixels: Tensor) -> None:
    """Puts into the model what fits of a LLaVA with one tower block and one LLM layer less.

    Args:
        model: changed in place.
        llava: tiny-llava.
        pixels: some pictures `(B, 3, H, W)` as the tower gets them, for the scale of its activations.
    """
    clip, visual = llava.model.vision_tower, model.model.visual
    hidden = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    stem, norm = clip.embeddings.patch_embedding.weight, clip.pre_layrnorm
    positions = clip.embeddings.position_embedding.weight[1:]
    embedded = clip.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + positions
    scale = norm.weight / (embedded - embedded.mean(-1, keepdim=True)).square().mean().sqrt()
    frames = visual.patch_embed.proj.weight
    frames.copy_(_centred(_centred(stem) * scale[:, None, None, None])[:, :, None] / frames.shape[2])
    constant = norm.bias + _centred(positions.mean(0)) * scale
    visual.blocks[0].attn.proj.bias.copy_(constant - constant.mean())
    for block, layer in zip(visual.blocks[1:], clip.encoder.layers):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = torch.cat([one.weight for one in projections])
        block.norm1.weight.copy_(layer.layer_norm1.weight)
        bias = torch.cat([one.bias for one in projections])
        block.attn.qkv.bias.copy_(bias + weight @ layer.layer_norm1.bias)
        block.attn.qkv.weight.copy_(weight)
        block.attn.proj.weight.copy_(_centred(attention.out_proj.weight))
        block.attn.proj.bias.copy_(_centred(attention.out_proj.bias))
        first, second = layer.mlp.fc1, layer.mlp.fc2
        block.norm2.weight.copy_(layer.layer_norm2.weight)
        block.mlp.gate_proj.weight.copy_(QUICK * first.weight)
        block.mlp.gate_proj.bias.copy_(QUICK * (first.bias + first.weight @ layer.layer_norm2.bias))
        block.mlp.up_proj.weight.mul_(0.1)
        block.mlp.up_proj.bias.fill_(1)
        block.mlp.down_proj.weight.copy_(_centred(second.weight) / QUICK)
        block.mlp.down_proj.bias.copy_(_centred(second.bias))
    projector, merger = llava.model.multi_modal_projector, visual.merger
    merger.ln_q.weight.fill_(float((hidden - hidden.mean(-1, keepdim=True)).square().mean().sqrt()))
    merged = MERGE * MERGE
    merger.mlp[0].weight.mul_(0.1).add_(torch.block_diag(*[projector.linear_1.weight] * merged))
    offset = hidden.mean() * projector.linear_1.weight.sum(1)  # what centring takes away
    merger.mlp[0].bias.copy_((projector.linear_1.bias + offset).repeat(merged))
    merger.mlp[2].weight.mul_(0.1).add_(projector.linear_2.weight.repeat(1, merged) / merged)
    merger.mlp[2].bias.copy_(projector.linear_2.bias)
    theirs, ours = llava.model.language_model, model.model.language_model
    for layer, given in zip(ours.layers[1:], theirs.layers):
        layer.load_state_dict(given.state_dict(), strict=False)  # all but the biases, which are 0
    ours.layers[0].self_attn.o_proj.weight.zero_()
    ours.layers[0].mlp.down_proj.weight.zero_()
    ours.norm.load_state_dict(theirs.norm.state_dict())
    known = len(theirs.embed_tokens.weight)
    ours.embed_tokens.weight[:known] = theirs.embed_tokens.weight
    ours.embed_tokens.weight[known:] *= 0.3
    model.lm_head.weight[:known] = llava.lm_head.weight


def unit_patches(rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Raster indices of the 2 x 2 patches of every visual token `(rows * cols // 4, 4)`, in the order of the image processor."""
    index = torch.arange(rows * cols, device=device).view(rows // MERGE, MERGE, cols // MERGE, MERGE)
    return index.transpose(1, 2).reshape(-1, MERGE * MERGE)


def qwen_tower_pass(visual, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs the tower on pictures of one size.

    Args:
        visual: the vision tower.
        pixels: `(B, 3, H, W)` normalised; sides in steps of 16 pixels.
        kept: visual tokens whose patches the tower sees `(B, K)`, or None for all; the others might as well not be there.

    Returns:
        Features of the patches `(B, 4 K, D)`, 2 x 2 by 2 x 2, and merged ones `(B, K, D)`.
    """
    batch, _, height, width = pixels.shape
    rows, cols, side = height // PATCH, width // PATCH, WINDOW // PATCH
    patches = unit_patches(rows, cols, pixels.device).expand(batch, -1, -1)
    if kept is not None:
        patches = patches[torch.arange(batch, device=pixels.device)[:, None], kept]
    patches = patches.flatten(1)  # (B, P)
    stem = visual.patch_embed.proj.weight.sum(2)  # both frames of a picture are the same
    hidden = F.conv2d(pixels, stem, stride=PATCH).flatten(2).transpose(1, 2)
    hidden = hidden[torch.arange(batch, device=pixels.device)[:, None], patches]
    row, col = patches // cols, patches % cols
    cos, sin = visual.rotary_pos_emb(hidden, torch.stack([row, col], -1).flatten(0, 1))
    cos, sin = cos.view(batch, patches.shape[1], -1), sin.view(batch, patches.shape[1], -1)
    window = row // side * cols + col // side
    apart = (window[:, None] != window[:, :, None])[:, None]  # (B, 1, P, P)
    barred = torch.zeros_like(apart, dtype=hidden.dtype).masked_fill(apart, torch.finfo(hidden.dtype).min)
    for number, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1))
        query, key, value = qkv.unbind(2)  # (B, P, heads, d)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * block.attn.scaling  # on a CPU quicker to train than SDPA
        if number not in visual.fullatt_block_indexes:
            scores = scores + barred
        attended = scores.softmax(-1) @ value.transpose(1, 2)
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return hidden, visual.merger(hidden).view(batch, -1, visual.config.out_hidden_size)


def mrope_positions(where: Tensor, cols: int, start: int) -> Tensor:
    """M-RoPE positions `(3, B, K)` of visual tokens with raster indices `where` `(B, K)` in rows of `cols` tokens."""
    return start + torch.stack([torch.zeros_like(where), where // cols, where % cols])


def first_layer(model, visual: Tensor, positions: Tensor, head: Tensor) -> Tensor:
    """Visual tokens after the first layer of the LLM `(B, K, D)`, without the rest of it."""
    llm = model.model.language_model
    before = model.get_input_embeddings()(head).expand(len(visual), -1, -1)
    tokens = torch.cat([before, visual], 1)
    ahead = torch.arange(len(head), device=visual.device).expand(3, len(visual), -1)
    turns = llm.rotary_emb(tokens, torch.cat([ahead, positions], -1))
    mask = torch.full((tokens.shape[1],) * 2, torch.finfo(tokens.dtype).min, device=visual.device).triu(1)[None, None]
    return llm.layers[0](tokens, attention_mask=mask, position_embeddings=turns)[:, len(head) :]
