"""Tokenizers and processors of the embedded checkpoints.

Words of the benchmark's questions and answers are one token each; everything else is spelled (`cafe` is `c ##a ##f ##e`),
so that any ASCII text can be read and printed words have to be read letter by letter.
"""

import re
import string

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AddedToken,
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtr.data.questions import PLURALS
from vtr.data.scenes import COLORS, SHAPES, SIGNS, SIZES

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
WORDS = (
    "is there a an what color shape the object how many are objects where seen from does sign say which part holds "
    "yes no left right above below top middle bottom center of in on picture image this read count"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>\n", VISION_START + IMAGE_PAD + VISION_END)
PIXELS, PATCH, MERGE = 192, 8, 2
FEWEST_PIXELS = 96 * 96
PINPOINTS = [[192, 384], [384, 192], [384, 384]]
VIDEO = "<video>"
VIDEO_WORDS = "video frame frames appear appears before after first last way move moves up down times blink blinks".split()
VIDEO_TEMPLATE = CHAT_TEMPLATE.replace("{% elif", "{% elif part['type'] == 'video' %}{{ '<video>\n' }}{% elif")
VIDEO_PIXELS = 96
VIDEO_PINPOINTS = [[96, 192], [192, 96], [192, 192]]


def build_tokenizer(qwen: bool = False, video: bool = False) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that spells unknown words; lower case, left padding, adds `<bos>`.

    Args:
        qwen: with the special tokens of Qwen2.5-VL around images, after all others.
        video: with the words of questions about clips and the token of a video, after all others.
    """
    characters = sorted(set(string.printable[:95].lower()) - {" "})
    words = [*WORDS, *COLORS, *SHAPES, *PLURALS.values(), *SIZES, *SIGNS]
    entries = dict.fromkeys([*SPECIAL, *ROLES, *characters, *("##" + c for c in characters), *words])
    special = (*SPECIAL, VIDEO) if video else SPECIAL
    if video:
        entries |= dict.fromkeys([VIDEO, *VIDEO_WORDS])
    core = Tokenizer(WordPiece({entry: n for n, entry in enumerate(entries)}, unk_token="<unk>", max_input_chars_per_word=1000))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", entries_index(entries, "<bos>"))]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(role, special=False, normalized=False) for role in ROLES])
    named = {"image_token": "<image>"}
    if qwen:
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN])
        named = {"image_token": IMAGE_PAD, "video_token": VIDEO_PAD}
    if video:
        named = {"image_token": "<image>", "video_token": VIDEO}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def entries_index(entries: dict[str, None], token: str) -> int:
    """Returns the position of a token in the vocabulary."""
    return list(entries).index(token)


def build_processor(next_: bool = False) -> LlavaProcessor | LlavaNextProcessor:
    """Returns the processor of tiny-llava, or of tiny-llava-next: images are resized to 192 pixels without cropping."""
    side = {"height": PIXELS, "width": PIXELS}
    common = dict(size=side, crop_size=side, do_center_crop=False)
    shared = dict(
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    if next_:
        return LlavaNextProcessor(image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **common), **shared)
    return LlavaProcessor(image_processor=CLIPImageProcessor(**common), **shared)


def build_video_processor() -> LlavaNextVideoProcessor:
    """Returns the processor of tiny-llava-video: frames are resized to 96 pixels without cropping, all that are given are taken."""
    side = {"height": VIDEO_PIXELS, "width": VIDEO_PIXELS}
    common = dict(size=side, crop_size=side, do_center_crop=False)
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(default_to_square=True, do_sample_frames=False, **common),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=VIDEO_PINPOINTS, **common),
        tokenizer=build_tokenizer(video=True),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        video_token=VIDEO,
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=VIDEO_TEMPLATE,
    )


def build_qwen_processor() -> Qwen2_5_VLProcessor:
    """Returns the processor of tiny-qwen-vl: images keep their shape, in steps of 16 pixels, with 192 x 192 pixels at most."""
    grid = dict(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, min_pixels=FEWEST_PIXELS, max_pixels=PIXELS * PIXELS)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid),
        tokenizer=build_tokenizer(qwen=True),
        video_processor=Qwen2VLVideoProcessor(**grid),
        chat_template=QWEN_TEMPLATE,
    )


def spelled(tokens: list[str]) -> bool:
    """Tells whether a word was split into single characters."""
    return all(re.fullmatch(r"(##)?.", token) for token in tokens)
