"""Frames of a video: from a folder of pictures, an animated GIF, WebP or PNG (Pillow), or a video file (PyAV, the extra `video`).

`n` frames are spread evenly from the first to the last, as LLaVA-OneVision and lmms-eval sample: frame `floor(i (total - 1) / (n - 1))`.
Of a video file the packets are read but only what is needed is decoded: from the last key frame before each frame on.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from vtr.data.pictures import as_shown, open_image, whole_files
from vtr.types import VtrError
from vtr.types.errors import MissingPackage, WrongValue

PICTURES = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
UNKNOWN_FPS = 2.0
"""Frames per second of pictures without times: as many as Qwen-VL reads of a video."""
_BROKEN = (OSError, SyntaxError, EOFError, ValueError, LookupError, struct.error)  # what Pillow raises for broken animations
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameQuestion:
    """What a second model is asked of every frame by itself, to learn how much the frame has to do with a question about the video.

    Args:
        texts: questions; the likeliest answer counts.
        words: spellings of the word whose probability at the first place of the answer is the score, each one token of the model's, those that
            are not left out; none = the likeliest token, whatever it is: how sure the model is of its answer from this frame.
    """

    texts: tuple[str, ...]
    words: tuple[str, ...] = ("yes", "Yes")

    def __post_init__(self) -> None:
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise WrongValue(f"FrameQuestion: texts must hold at least one question and no empty one, got {self.texts!r}")


@dataclass(frozen=True)
class Video:
    """Frames of a video, and which of its frames they are.

    Args:
        frames: RGB, in order, all of one size.
        indices: of these frames among all of the video, ascending from 0.
        total: frames of the video.
        fps: frames per second of the video, None where nothing says it.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """Returns what the processors of transformers want to know as `video_metadata`."""
        fps = self.fps or UNKNOWN_FPS
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.total,
            "fps": fps,
            "duration": self.total / fps,
            "frames_indices": list(self.indices),
            "width": width,
            "height": height,
        }


def evenly(total: int, count: int) -> list[int]:
    """Returns the numbers of at most `count` of `total` frames, evenly from the first to the last; of one frame the first."""
    if count >= total:
        return list(range(total))
    return [index * (total - 1) // max(count - 1, 1) for index in range(count)]


def video_of(frames: Sequence[Image.Image], most: int | None = None, fps: float | None = None) -> Video:
    """Returns pictures in memory as a video.

    Args:
        frames: all frames, in order.
        most: so many of them, spread evenly; None for all.
        fps: frames per second, where that is known.

    Raises:
        ValueError: no frame, frames of different sizes, or `most` below 1.
        VtrError: a picture that cannot be shown.
    """
    if not frames:
        raise WrongValue("video: must have at least one frame, got none; give some")
    indices = evenly(len(frames), _checked(len(frames) if most is None else most))
    return _made([as_shown(frames[index]) for index in indices], indices, len(frames), fps, "given frames")


def read_video(path: str | Path, count: int) -> Video:
    """Reads frames of a video, spread evenly; all of them where it has fewer, which is logged.

    Args:
        path: a folder of pictures, which are sorted as people count (2 before 10), or a file.
        count: frames to read.

    Raises:
        ValueError: no such path, an empty folder, a file without frames or damaged, frames of different sizes, or `count` below 1.
        VtrError: a video file, and PyAV is not installed.
    """
    path, _ = Path(path), _checked(count)
    if path.is_dir():
        video = _from_folder(path, count)
    elif not path.is_file():
        raise WrongValue(f"video: no file or folder {str(path)!r}; check the path")
    elif path.suffix.lower() in PICTURES:
        video = _from_picture(path, count)
    else:
        video = _from_file(path, count)
    if len(video.frames) < count:
        _log.info("%r has %d frames, fewer than the %d asked for; all are used", str(path), len(video.frames), count)
    return video


def _checked(count: int) -> int:
    if count < 1:
        raise WrongValue(f"video: frames must be at least 1, got {count}; ask for one or more")
    return count


def _made(frames: list[Image.Image], indices: Sequence[int], total: int, fps: float | None, what: str) -> Video:
    for index, frame in zip(indices, frames, strict=True):
        if frame.size != frames[0].size:
            sizes = " and ".join(f"{one.width} x {one.height}" for one in (frames[0], frame))
            raise WrongValue(f"video: frames must have one size, got {sizes} (number {index}) in {what}; resize them first")
    return Video(tuple(frames), tuple(indices), total, fps)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts `frame2` before `frame10`."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _from_folder(path: Path, count: int) -> Video:
    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file()]
    if not files:
        raise WrongValue(f"video: folder {str(path)!r} has no pictures ({', '.join(PICTURES)}), got none; give a folder of frames")
    files.sort(key=_natural)
    indices = evenly(len(files), count)
    try:
        frames = [open_image(files[index]) for index in indices]
    except VtrError as error:
        raise WrongValue(f"video: folder {str(path)!r}: {error}; replace or remove that file") from None
    return _made(frames, indices, len(files), None, f"folder {str(path)!r}")


def _from_picture(path: Path, count: int) -> Video:
    """Returns the frames of an animation, every one of which has to be decoded on the way to the last; of a still picture its one."""
    frames, duration = [], 0.0
    try:
        with Image.open(path) as image, whole_files():
            total = getattr(image, "n_frames", 1)
            indices = evenly(total, count)
            for index in range(total if total > 1 else 0):
                image.seek(index)
                image.load()  # says how long it is shown
                duration += image.info.get("duration", 0) / 1000
                if index in indices:
                    frames.append(as_shown(ImageOps.exif_transpose(image)))
        frames = frames or [open_image(path)]
    except UnidentifiedImageError:
        raise WrongValue(f"video: {str(path)!r} is not a picture or animation that Pillow can read; give another file") from None
    except (*_BROKEN, Image.DecompressionBombError, VtrError) as error:
        raise WrongValue(f"video: {str(path)!r} is damaged or cannot be shown ({error}); give another file") from None
    return _made(frames, indices, total, total / duration if duration else None, repr(str(path)))


def _from_file(path: Path, count: int) -> Video:
    try:
        import av
    except ImportError:
        instead = "give a folder of frames or an animated GIF"
        raise MissingPackage.of(f"video: reading {str(path)!r}", "PyAV", "video", instead) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise WrongValue(f"video: {str(path)!r} has no video stream, got {_streams(container)}; give another file")
            stream = container.streams.video[0]
            found = _packets(container, stream)
            if "mov" in container.format.name and found.there < stream.frames:
                raise WrongValue(f"video: {str(path)!r} is cut short, {found.there} of {stream.frames} frames are there; give a whole file")
            fps, indices = _fps(stream, found.times), evenly(len(found.times), count)
            frames = _jumped(container, stream, [found.times[index] for index in indices], found.keys)
        total = len(found.times)
        if not indices or len(frames) < len(indices):  # without times, or where jumps are not exact
            total = total or sum(1 for _ in _decoded(av, path))
            indices = evenly(total, count)
            frames = [_upright(frame) for index, frame in enumerate(_decoded(av, path)) if index in indices]
    except av.error.FFmpegError as error:
        raise WrongValue(f"video: {str(path)!r} cannot be decoded ({error.strerror or error}); give another file") from None
    if not total:
        raise WrongValue(f"video: {str(path)!r} has no frames, got a video stream without any; give another file")
    if len(frames) < len(indices):
        raise WrongValue(f"video: {str(path)!r} is damaged, {len(frames)} of {len(indices)} frames could be decoded; give another file")
    return _made(frames, indices, total, fps, repr(str(path)))


def _streams(container: Any) -> str:
    return ", ".join(stream.type for stream in container.streams) or "no streams"


class _Packets(NamedTuple):
    """What the packets of a stream say: how many there are, and times of all frames and of key frames, ascending, in its own units."""

    there: int
    times: list[int]
    keys: list[int]


def _packets(container: Any, stream: Any) -> _Packets:
    """Reads all packets and decodes none."""
    count, times, keys = 0, set(), []
    for packet in container.demux(stream):
        count += bool(packet.size)
        if packet.pts is not None and packet.size and not packet.is_discard:
            times.add(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    return _Packets(count, sorted(times), sorted(keys))


def _jumped(container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]) -> list[Image.Image]:
    """Returns the frames of some times, ascending, up to the first that is not found.

    Jumps to the last key frame before a time unless the frames up to it are about to come anyway. Some formats jump past it.
    """
    found: list[Image.Image] = []
    stream.thread_type = "AUTO"
    decoded: Iterator[Any] = iter(())
    now: int | None = None
    for time in wanted:
        key = max((key for key in keys if key <= time), default=None)
        if now is None or (key is not None and key > now):
            container.seek(time if key is None else key, stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            now = frame.pts
            if now is None or now >= time:
                break
        if now != time:
            break
        found.append(_upright(frame))
    return found


def _decoded(av: Any, path: Path) -> Iterator[Any]:
    """Yields all frames of a file."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        yield from container.decode(container.streams.video[0])


def _upright(frame: Any) -> Image.Image:
    """Returns a frame as a picture, turned as its display matrix says."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _fps(stream: Any, times: Sequence[int]) -> float | None:
    """Returns frames per second, measured where there are times, else as the file says."""
    if len(times) > 1 and stream.time_base:
        return float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))
    return float(stream.average_rate) if stream.average_rate else None
