"""Methods for videos as the released codes are: `compat="authors"` on Views of several videos, and on a model."""

from dataclasses import replace

import pytest
import torch

import vtr
from tests.methods.videos import GEOMETRY, signal_of
from tests.oracles import Setup
from tests.tiny_models import generate
from tests.views import Video, video_view
from vtr.methods.dycoke import dycoke_authors
from vtr.methods.evs import evs, evs_count
from vtr.methods.holitom import HoliTom, authors_shares, holitom, windows_of
from vtr.methods.prunevid import PruneVid, prunevid_authors
from vtr.methods.vidcom2 import likeness, quiet_channels, vidcom2
from vtr.ops.frames import by_frame
from vtr.testing.families import Clip
from vtr.types.signals import TEXT, attention, received

DEEP = replace(GEOMETRY, llm_layers=12, layer_kinds=())
VIDEOS = [
    Video(8, (4, 4), seed=1, scenes=2, grain=0.1),
    Video(13, (3, 4), seed=2, scenes=3, grain=0.35),
    Video(6, (5, 3), seed=3, scenes=1, grain=0.3),
]
SEEN = received(GEOMETRY.feature_layer)
NAMES = ("dycoke", "evs", "holitom", "prunevid", "vcast", "vidcom2")


def frames_of(video):
    count, places = video.frames, video.grid[0] * video.grid[1]
    cells = torch.cartesian_prod(torch.arange(count), *map(torch.arange, video.grid))[None]
    return by_frame(video.tokens(8)[None], torch.ones(1, count * places, dtype=torch.bool), cells, [video.grid], [count])


def alone(name, video):
    """Numbers of the tokens that the released code leaves of one video in front of the LLM, in its order, and their values."""
    frames = frames_of(video)
    tokens, real = frames.tokens, frames.real
    flat = tokens[0].flatten(0, 1)
    if name == "evs":
        keep = torch.tensor([evs_count(video.frames, real.shape[2], 0.7)])
        index = evs(tokens, real, keep).flatten().nonzero()[:, 0]
    elif name == "vidcom2":
        kept = vidcom2(likeness(frames, quiet_channels(frames)), real, torch.tensor([0.25], dtype=torch.float64), None)
        index = kept.flatten().nonzero()[:, 0]
    elif name == "dycoke":
        order, kept = dycoke_authors(tokens, real, [video.frames], 0.7)
        index = order[0, : int(kept.sum())]
    elif name == "prunevid":
        return None, prunevid_authors(frames, 0.8, 0.25, 0.5).values
    else:
        windows, _ = windows_of(frames)
        shares, _ = authors_shares(frames, windows, 0.25)
        found = holitom(frames, signal_of()(video).view(real.shape), windows, shares, least=1)
        kept, still = found.keep[0], windows.static[0]
        parts = []
        for start in windows.start[0].unique().tolist():
            own = [t for t in range(video.frames) if windows.start[0, t] == start]
            parts += [(kept[t] & still[t]).nonzero()[:, 0] + t * real.shape[2] for t in own]
            parts += [(kept[t] & ~still[t]).nonzero()[:, 0] + t * real.shape[2] for t in own]
        index, flat = torch.cat(parts), found.tokens[0].flatten(0, 1)
    return index.tolist(), flat[index]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "vcast"])
def test_several_videos_are_each_as_the_released_code_makes_it(name):
    method = vtr.create_method(name, compat="authors")
    first = method.steps(DEEP)[0]
    assert not first.counted and first.multiple is None
    view = video_view(VIDEOS, 20, signals={SEEN: signal_of()}, filler=2)
    selection = first.select(view)
    for row, video in enumerate(VIDEOS):
        index, values = alone(name, video)
        if selection.index is None:
            tokens = view.tokens if selection.tokens is None else selection.tokens
            found, made = view.patch[row][selection.keep[row]].tolist(), tokens[row][selection.keep[row]]
        else:
            own = selection.index[row][selection.real[row]]
            found, given = view.patch[row][own].tolist(), selection.tokens
            made = view.tokens[row][own] if given is None else given[row][selection.real[row]]
            assert selection.order == "given"
        assert index is None or found == index
        assert torch.allclose(made.double(), values.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_they_run_on_a_model(name):
    setup = Setup("llava_next_video_clips", dtype=torch.float64)
    batch = setup.batch((3, Clip(frames=6), 4), (2, Clip(frames=6), 5)) if name == "dycoke" else setup.batch()
    settings = {"layer": 2} if name in ("holitom", "prunevid") else {}
    plan = vtr.plan(setup.model, name, compat="authors", **settings)
    assert plan.adaptive == (name != "vcast")
    with torch.no_grad(), vtr.reduced(setup.model, name, compat="authors", **settings) as reduction:
        answer = generate(setup.model, batch, 3)
    report = reduction.report()
    assert answer.sequences.shape[1] > 3 and all(0 < len(video.retained) < video.visual_tokens for video in report.images)
    if name == "evs":
        counts = [min(evs_count(v.frames, v.visual_tokens // v.frames, 0.7), v.visual_tokens) for v in report.images]
        assert [len(video.retained) for video in report.images] == counts


def test_the_inner_steps_round_as_the_released_codes():
    rows = torch.rand(1, 5, generator=torch.Generator().manual_seed(0))
    view = video_view([Video(1, (1, 5), scenes=1)], 5, signals={attention(1): lambda video: rows[0]})
    inner = HoliTom(compat="authors", layer=2, inner_ratio=0.5).steps(DEEP)[1]
    assert inner.select(view).keep.sum() == 2, "round(2.5) is 2 in Python"
    prune = PruneVid(compat="authors", layer=2).steps(DEEP)[1]
    assert prune.needs == (attention(1, TEXT, heads=True),) and not prune.counted and prune.earlier_keys


@pytest.mark.parametrize("name", ["evs", "vidcom2", "dycoke", "holitom"])
def test_the_released_codes_take_a_share(name):
    with pytest.raises(ValueError, match=f"{name}: compat='authors' keeps what the released code makes of keep_ratio, got Budget.keep=9"):
        vtr.create_method(name, compat="authors", keep=9).steps(DEEP)
