"""VidCom2 vectors (authors' code): features -> channels, likeness to video and frame, share and number kept of each frame, tokens kept."""

from __future__ import annotations

import torch

from scripts.replay import Vector, close, same_index
from scripts.replay._videos import frames_of_tokens
from vtr.methods.vidcom2 import frame_shares, likeness, quiet_channels, vidcom2


def replay(vector: Vector) -> None:
    if not vector.has("features", "channels", "video_score", "frame_score", "scales", "keep_per_frame", "keep_indices"):
        raise vector.unknown_schema()
    count = int(vector.param("num_frames"))
    frames = frames_of_tokens(vector["features"].unflatten(0, (count, -1)))
    channels = quiet_channels(frames, float(vector.param("channel_ratio")))
    same_index("channels", channels[0], vector["channels"])
    like = likeness(frames, channels)
    close("video_score", like.video[0], vector["video_score"])
    close("frame_score", like.frame[0], vector["frame_score"])
    base, temperature = torch.tensor([float(vector.param("base_scale"))]), float(vector.param("temperature"))
    close("scales", frame_shares(like.video, frames.real, base, temperature)[0], vector["scales"], atol=1e-4)  # differences / temperature
    kept = vidcom2(like, frames.real, base, None, temperature)[0]
    same_index("keep_per_frame", kept.sum(1), vector["keep_per_frame"])
    same_index("keep_indices", kept.flatten().nonzero()[:, 0], vector["keep_indices"])
    if vector.has("keep_indices_grid"):
        side = int(vector.param("grid"))
        frame, place = kept.nonzero().T
        length = side * (side + 1)  # of a frame with its newlines
        visual = frame * length + place // side * (side + 1) + place % side
        newline = (torch.arange(count)[:, None] * length + (torch.arange(side) + 1) * (side + 1) - 1).flatten()
        order = torch.cat([2 * frame, 2 * torch.arange(count).repeat_interleave(side) + 1]).argsort(stable=True)
        same_index("keep_indices_grid", torch.cat([visual, newline])[order], vector["keep_indices_grid"])
