"""Images and prompts: what comes in is either usable or refused with a reason."""

import types
from typing import ClassVar

import pytest
import torch
from PIL import Image, ImageFile

from vtr.bench.stopwatch import Stopwatch
from vtr.data.pictures import open_image
from vtr.eval.run.asking import build_prompt, encode, generate, prefill_ms
from vtr.models.devices import cuda_devices, synchronize
from vtr.models.loading import load_model
from vtr.types import VtrError


class Template:
    """Stands in for a processor: writes the order of the parts."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return "|".join(part.get("text", "IMAGE") for part in messages[0]["content"])


def test_images_come_first_or_where_they_are_marked():
    assert build_prompt(Template(), "What?", 2) == "IMAGE|IMAGE|What?"
    assert build_prompt(Template(), "What?", 0) == "What?"
    assert build_prompt(Template(), "Left <image> or right <image>?", 2) == "Left|IMAGE|or right|IMAGE|?"


@pytest.mark.parametrize(("question", "images"), [("<image> and <image>", 1), ("<image>?", 2), ("<image>?", 0)])
def test_image_count_must_match_the_prompt(question, images):
    with pytest.raises(ValueError, match=rf"question: has {question.count('<image>')} x <image> but {images} image"):
        build_prompt(Template(), question, images)


def test_a_processor_without_template_is_refused():
    with pytest.raises(VtrError, match="has no chat template"):
        build_prompt(object(), "What?", 1)


def test_missing_image(tmp_path):
    with pytest.raises(ValueError, match=r"image: no file .*gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="image: no file"):
        open_image(tmp_path)


def test_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(VtrError, match="is not an image that Pillow can read"):
        open_image(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(VtrError, match="is damaged"):
        open_image(path)


@pytest.mark.parametrize("factor", [1.5, 3])  # Pillow itself warns at the first and raises at the second
def test_decompression_bomb(tmp_path, monkeypatch, factor):
    Image.new("RGB", (40, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40 * 30 / factor))
    with pytest.raises(ValueError, match=r"has too many pixels .* at most \d+; make it smaller first"):
        open_image(tmp_path / "bomb.png")


def test_images_are_turned_and_made_rgb(tmp_path):
    image = Image.new("LA", (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # camera was held upright
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.mode == "RGB"
    assert opened.size == (30, 40)


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-llava", "cpu")


def test_a_tokenizer_without_padding_token_stays_as_it_is(loaded):
    import copy

    model, processor = loaded
    mine = copy.copy(processor)
    mine.tokenizer = copy.deepcopy(processor.tokenizer)
    mine.tokenizer.pad_token = None
    pictures, questions = [[Image.new("RGB", (60, 40), "red")], [Image.new("RGB", (40, 60))]], ["what color is the red circle ?", "what ?"]
    batch = encode(mine, questions, pictures)
    expected = encode(processor, questions, pictures)
    assert mine.tokenizer.pad_token is None and mine.tokenizer.pad_token_id is None
    real = expected["attention_mask"] == 1
    assert not real[1, 0] and torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["input_ids"][real], expected["input_ids"][real])
    assert set(batch["input_ids"][~real].tolist()) == {processor.tokenizer.eos_token_id}
    assert generate(model, mine, batch, 4)[0] == generate(model, processor, expected, 4)[0]
    alone = encode(mine, questions[1:], pictures[1:])
    assert alone["attention_mask"].all() and mine.tokenizer.pad_token is None
    mine.tokenizer.eos_token = None
    with pytest.raises(VtrError, match="processor: its tokenizer has no padding token and no end token.*--batch-size 1"):
        encode(mine, questions, pictures)


class Spread(torch.nn.Module):
    """A model on three GPUs that this machine does not have: two by `device_map`, a third by its parameters."""

    device = torch.device("cuda:1")
    hf_device_map: ClassVar = {"tower": 0, "layers": "cuda:1", "head": "cpu", "more": "disk"}

    def parameters(self, recurse=True):
        return iter([types.SimpleNamespace(device=torch.device(d)) for d in ("cuda:2", "cuda:1", "meta", "cpu")])

    def generate(self, **kwargs):
        return None


def test_every_device_of_a_model_is_waited_for(monkeypatch, loaded):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append(str(device)))
    prefill_ms(Spread(), {})
    assert seen == 2 * ["cuda:1", "cuda:2", "cuda:0"]
    seen.clear()
    synchronize(torch.device("cuda:3"))
    synchronize(torch.device("cpu"))
    synchronize(loaded[0])
    assert seen == ["cuda:3"] and cuda_devices(loaded[0]) == []


def test_a_mark_comes_after_the_work_of_every_device(monkeypatch):
    happened = []

    class Stream:
        def __init__(self, device):
            self.device = str(device)

        def wait_stream(self, other):
            happened.append(f"{self.device} waits for {other.device}")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            happened.append(f"event on {stream.device}")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Stopwatch(Spread()).mark("start")
    assert happened == ["cuda:1 waits for cuda:2", "cuda:1 waits for cuda:0", "event on cuda:1"]
