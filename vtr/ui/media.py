"""What was uploaded: one picture, or one video as a file or as its frames; limits, and a sentence for everything that is neither."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vtr.data.frames import PICTURES, Video, read_video
from vtr.data.pictures import open_image
from vtr.types import Kind, VtrError
from vtr.types.errors import MissingPackage, WrongValue

MIB = 2**20
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Limits:
    """The largest upload: mebibytes of all files, pixels of a picture or a frame, and frames that are read of a video."""

    mib: int = 50
    pixels: int = 40_000_000
    frames: int = 32

    def __str__(self) -> str:
        return f"at most {self.mib} MiB, {self.pixels // 10**6} megapixels a picture or frame, {self.frames} frames read of a video"


LIMITS = Limits()


@dataclass(frozen=True)
class Media:
    """One picture or one video.

    Args:
        path: of the file, or of the folder of frames; what a command is given.
        image, video: one of the two.
        frames: that were asked for of a video.
    """

    path: Path
    image: Image.Image | None = None
    video: Video | None = None
    frames: int = 0

    @property
    def kind(self) -> Kind:
        """Returns what it is."""
        return "video" if self.video else "image"

    @property
    def described(self) -> str:
        """Returns it in words."""
        if self.video:
            width, height = self.video.frames[0].size
            return f"video {self.path.name}: {len(self.video.frames)} of {self.video.total} frames, {width} x {height} pixels"
        assert self.image is not None
        return f"picture {self.path.name}: {self.image.width} x {self.image.height} pixels"


def open_media(files: Sequence[str | Path], room: Path, frames: int = 16, limits: Limits = LIMITS) -> Media:
    """Opens a picture, a video, or several pictures that are the frames of one.

    Args:
        files: one picture, animation or video file, or the pictures of all frames, which are sorted by name as people count.
        room: an empty folder that frames are copied into, so that a command can be given it.
        frames: read of a video, spread evenly.
        limits: of the upload.

    Raises:
        ValueError: no file, an empty one, neither a picture nor a video, a damaged one, or above the limits.
        VtrError: a video file, and PyAV is not installed.
    """
    paths = [Path(file) for file in files]
    _check_files(paths, limits)
    if not 1 <= frames <= limits.frames:
        raise WrongValue(f"upload: frames must be from 1 to {limits.frames}, got {frames}; read fewer")
    try:
        if len(paths) > 1:
            return _opened_video(_folder(paths, room), frames, limits)
        (path,) = paths
        if path.suffix.lower() in VIDEOS or _is_animated(path):
            return _opened_video(path, frames, limits)
        return Media(path, image=open_image(path, limits.pixels))
    except (WrongValue, VtrError) as error:  # names of files, not where they are stored
        message = str(error)
        for path in (room / "frames", *paths):
            message = message.replace(str(path), path.name)
        raise (MissingPackage if isinstance(error, MissingPackage) else WrongValue)(message) from None


def _check_files(paths: Sequence[Path], limits: Limits) -> None:
    if not paths:
        raise WrongValue("upload: needs a picture or a video, got no file; choose one, or click an example")
    for path in paths:
        if not path.is_file():
            raise WrongValue(f"upload: no file {path.name!r}; choose it again")
        if not path.stat().st_size:
            raise WrongValue(f"upload: {path.name!r} is empty; choose another file")
        if len(paths) > 1 and path.suffix.lower() not in PICTURES:
            raise WrongValue(
                f"upload: several files must be pictures, the frames of a video, got {path.name!r}; choose one file, or pictures only"
            )
    size = sum(path.stat().st_size for path in paths)
    if size > limits.mib * MIB:
        raise WrongValue(f"upload: has {size / MIB:.1f} MiB, at most {limits.mib}; make it smaller first")


def _is_animated(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1 and image.format in ("GIF", "WEBP", "PNG")
    except Exception:  # whatever Pillow raises for a broken file is said when it is opened
        return False


def _opened_video(path: Path, frames: int, limits: Limits) -> Media:
    first = read_video(path, 1).frames[0]  # before memory is spent on all of them
    if first.width * first.height > limits.pixels:
        raise WrongValue(
            f"upload: a frame of {path.name!r} has {first.width} x {first.height} pixels, at most {limits.pixels}; make the video smaller first"
        )
    return Media(path, video=read_video(path, frames), frames=frames)


def _folder(paths: Sequence[Path], room: Path) -> Path:
    folder = room / "frames"
    folder.mkdir()
    for number, path in enumerate(paths):
        target = folder / path.name
        shutil.copyfile(path, target if not target.exists() else folder / f"{path.stem}-{number}{path.suffix}")
    return folder
