"""Relevance by a CLIP text tower: `relevance="clip"` of CDPruner and Script, on tiny random models."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.embedded import LONGEST, random_clip
from tests.marks import quick_first
from tests.tiny_models import ONE, ONE_EACH, ROWS, TOWER, batch_of, model_of
from vtr.engine.llm.text_tower import TextTower
from vtr.methods.cdpruner import cdpruner
from vtr.ops.dpp import min_max


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP checkpoint on disk whose vision tower is as wide as the tiny models'."""
    return random_clip(tmp_path_factory.mktemp("clip"), TOWER)


@pytest.fixture
def processor(clip):
    """Decodes the tiny models' ids as words of the same names."""
    from transformers import AutoTokenizer

    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(clip))


def kept(model, batch, method="cdpruner", **settings):
    with torch.no_grad(), vtr.reduced(model, method, keep=7, relevance="clip", **settings) as reduction:
        model(**batch.inputs)
    return [image.retained for image in reduction.report().images]


def test_the_choice_is_made_from_clips_own_embeddings(clip):
    """Against the formula on an unreduced pass: penultimate features through post_layernorm and visual_projection, minus the cosine."""
    from transformers import CLIPModel

    model, batch, whole = model_of("llava"), batch_of("llava", ONE), CLIPModel.from_pretrained(clip)
    question = "w7 w30 w8"
    with torch.no_grad():
        base = model.model
        hidden = base.vision_tower(batch.inputs["pixel_values"], output_hidden_states=True).hidden_states
        features = hidden[model.config.vision_feature_layer][:, 1:]
        tokens = base.multi_modal_projector(features)
        image = whole.visual_projection(whole.vision_model.post_layernorm(features))
        text = whole.get_text_features(input_ids=torch.tensor([[1, 7, 30, 8, 2]])).pooler_output
    real, count = torch.ones(tokens.shape[:2], dtype=torch.bool), torch.tensor([7])
    for sign in (-1, 1):
        quality = min_max(sign * F.cosine_similarity(image, text[:, None], dim=-1), real)
        expected = cdpruner(tokens, quality, real, count, 7)[0].nonzero().flatten().tolist()
        assert kept(model, batch, question=question, text_tower=str(clip), sign=sign) == [expected]
    assert kept(model, batch, question=question, text_tower=str(clip)) == kept(
        model, batch, question=question, text_tower=str(clip), sign=-1
    )


@pytest.mark.parametrize("kind", quick_first(["llava_next", "llava"]))
@pytest.mark.parametrize("method", quick_first(["cdpruner", "script"]))
def test_every_prompt_has_its_own_question(clip, processor, kind, method):
    model, batch = model_of(kind), batch_of(kind, ROWS)
    together = kept(model, batch, method, processor=processor, text_tower=str(clip))
    alone = [image for row in range(2) for image in kept(model, batch.row(row), method, processor=processor, text_tower=str(clip))]
    assert together == alone
    same = kept(model, batch, method, question="w5 w6", text_tower=str(clip))
    listed = kept(model, batch, method, question=["w5 w6", "w90 w17 w44"], text_tower=str(clip))
    assert same[0] == listed[0] and same[1:] != listed[1:]


def test_beams_share_the_question(clip, processor):
    model, batch = model_of("llava"), batch_of("llava", ONE_EACH)
    for given in ({"processor": processor}, {"question": ["w5 w6", "w90 w17 w44"]}):
        with vtr.reduced(model, "cdpruner", keep=7, relevance="clip", text_tower=str(clip), **given) as reduction:
            model.generate(**batch.inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        assert [image.retained for image in reduction.report().images] == kept(model, batch, text_tower=str(clip), **given)


def test_a_long_question_is_cut_into_segments_with_their_own_bounds(clip):
    tower = TextTower(str(clip))
    words = [f"w{n}" for n in range(20, 20 + 13)]
    ids = tower.segments(" ".join(words))
    assert ids.shape == (2, LONGEST) and ids[0].tolist() == [1, *range(20, 30), 2] and ids[1].tolist() == [1, 30, 31, 32, 2, *[2] * 7]
    found = tower.embed([" ".join(words), "w9"], torch.tensor([0, 1, 0]))
    assert found.real.tolist() == [[True, True], [True, False], [True, True]]
    short = tower.model.get_text_features(input_ids=torch.tensor([[1, 30, 31, 32, 2]])).pooler_output
    torch.testing.assert_close(found.text[0, 1], short[0])  # padding behind EOS has no part in it


def test_what_cannot_be_is_refused(clip, tmp_path):
    model, batch = model_of("llava"), batch_of("llava", ONE)
    with pytest.raises(ValueError, match=r"cdpruner: relevance='clip' and text_tower= go together"):
        vtr.create_method("cdpruner", relevance="clip")
    with pytest.raises(ValueError, match=r"script: relevance='clip' and text_tower= go together"):
        vtr.create_method("script", text_tower="somewhere")
    with pytest.raises(ValueError, match=r"cdpruner: needs the question as text, got neither; give processor= or question="):
        vtr.apply(model, "cdpruner", keep=7, relevance="clip", text_tower=str(clip))
    with pytest.raises(ValueError, match="question must hold one string per prompt, got 3 for 1 prompts"):
        kept(model, batch, question=["w5"] * 3, text_tower=str(clip))
    with pytest.raises(TypeError, match="question must be a string or a list"):
        kept(model, batch, question=[5], text_tower=str(clip))
    model_of("llava").config.vision_config.save_pretrained(tmp_path)
    with pytest.raises(vtr.VtrError, match="text_tower: must be a CLIP checkpoint, got model type 'clip_vision_model'"):
        kept(model, batch, question="w5", text_tower=str(tmp_path))
    from transformers import CLIPConfig, CLIPModel

    other = CLIPModel(CLIPConfig(text_config={"vocab_size": 119, "hidden_size": 16}, vision_config=TOWER | {"hidden_size": 64}))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_bytes((clip / "tokenizer.json").read_bytes())
    (tmp_path / "other" / "tokenizer_config.json").write_bytes((clip / "tokenizer_config.json").read_bytes())
    with pytest.raises(vtr.VtrError, match="belongs to a vision tower of width 64, this model's features have 32"):
        kept(model, batch, question="w5", text_tower=str(tmp_path / "other"))
