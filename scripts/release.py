#!/usr/bin/env python
"""`make release-check`: builds sdist and wheel of the last commit, and runs vtr from each; `--full` takes requirements from the index."""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT, LIMIT_MB = Path(__file__).resolve().parents[1], 20


def run(cwd: Path, *command: object) -> str:
    """Runs a command, without PYTHONPATH, and returns what it printed; one that fails ends the check."""
    print("$", *command, flush=True)
    done = subprocess.run(["env", "-u", "PYTHONPATH", *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, text=True)
    return done.stdout if not done.returncode else sys.exit(f"{done.stdout}\nrelease: the command above failed")


def faults(wheel: Path, rebuilt: Path) -> list[str]:
    """Shows size and largest files of a wheel, and returns what is wrong: its size, or other files than the wheel made of the sdist has."""
    files = {file.filename: file.compress_size / 1e6 for file in zipfile.ZipFile(wheel).infolist()}
    size, differ = wheel.stat().st_size / 1e6, sorted(files.keys() ^ zipfile.ZipFile(rebuilt).namelist())
    largest = (f"{files[name]:8.2f} MB  {name}" for name in sorted(files, key=files.__getitem__)[:-9:-1])
    print(f"{wheel.name}: {size:.2f} MB, {len(files)} files", *largest, sep="\n")
    return [f"{size:.2f} MB, more than {LIMIT_MB}"] * (size > LIMIT_MB) + [f"not in both wheel and sdist: {name}" for name in differ]


def main(full: bool) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        clone, made = Path(folder, "clone"), [Path(folder, "wheel"), Path(folder, "sdist")]
        run(ROOT, "git", "clone", "--quiet", ROOT, clone)
        sdist = run(clone, sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_sdist('..'))").split()[-1]
        for home, source in zip(made, (".", f"../{sdist}")):
            run(clone, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", home, source)
        found = faults(*(wheel for home in made for wheel in home.iterdir()))
        for env, wheel in [(home / "env", *home.iterdir()) for home in made]:
            run(env.parent, sys.executable, "-m", "venv", env)
            run(env, env / "bin" / "pip", "install", "--quiet", *([] if full else ["--no-deps"]), wheel)
            libraries = "" if full else sysconfig.get_path("purelib")  # found behind vtr itself
            Path(sysconfig.get_path("purelib", "venv", {"base": str(env)}), "here.pth").write_text(libraries)
            print(*(run(Path(tempfile.mkdtemp(dir=env)), env / "bin" / "vtr", command, "--quiet") for command in ("doctor", "demo")))
    return "\n".join(f"release: {fault}" for fault in found) or None


if __name__ == "__main__":
    sys.exit(main("--full" in sys.argv[1:]))
