"""Copies models/, eval/ and the tested versions into the package when a wheel is built; everything else is in setup.cfg.

They lie outside `vtr/`, where setuptools' package data does not reach. An editable install reads them in place.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CHECKPOINTS = ("tiny-llava", "tiny-qwen-vl", "tiny-llava-video")  # of images, of images of any size, of videos; 20 MB have no room for all
WANTED = ("models/*.yaml", *(f"models/{name}/**/*" for name in CHECKPOINTS), "eval/**/*", "constraints/tested.txt")


class BuildWithData(build_py):
    """`build_py`, and the files as `vtr/_data/models`, `vtr/_data/eval` and so on."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib, "vtr", "_data")
        shutil.rmtree(data, ignore_errors=True)
        for source in (file for pattern in WANTED for file in Path().glob(pattern) if file.is_file()):
            (data / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, data / source)


setup(cmdclass={"build_py": BuildWithData})
