"""Which layers ShortV freezes: published lists, presets, files and given ones."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from vtr.methods.shortv import PUBLISHED, ShortV, read_layers
from vtr.types import Geometry


def geometry(host: str = "llava", layers: int = 32, **shape: int) -> Geometry:
    return Geometry(host, 24, 22, 1, True, (24, 24), layers, 576, text_config=shape)


def frozen(method: ShortV, where: Geometry) -> list[int]:
    steps = method.steps(where)
    assert all((s.stage, s.action) == ("prefill", "freeze") for s in steps)
    return [s.layer for s in steps]


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_published_lists_are_60_percent_of_the_layers_and_found_by_shape(preset: str) -> None:
    entry = PUBLISHED[preset]
    depth = entry.shape["num_hidden_layers"]
    assert len(set(entry.layers)) == len(entry.layers) == round(0.6 * depth) and entry.layers[0] == depth - 1
    where = geometry(entry.host, depth, **entry.shape)
    assert frozen(ShortV(), where) == frozen(ShortV(layers=preset), where) == sorted(entry.layers)


def test_another_model_of_the_same_depth_gets_no_list() -> None:
    mistral = geometry("llava_next", 32, **{**PUBLISHED["llava-next-7b"].shape, "num_key_value_heads": 8, "intermediate_size": 14336})
    with pytest.raises(ValueError, match="no published layer list for host 'llava_next' with 32 layers of width 4096; run `vtr calibrate"):
        ShortV().steps(mistral)


def test_given_layers_come_in_model_order_and_first_takes_the_least_contributing() -> None:
    assert frozen(ShortV(layers=(4, 1)), geometry(layers=5)) == [1, 4]
    assert ShortV(layers="llava-1.5-7b", first=3).frozen_layers(geometry()) == (31, 29, 30)
    assert frozen(ShortV.identity(576), geometry()) == frozen(ShortV(layers=(4, 1), first=0), geometry()) == []


@pytest.mark.parametrize("text", ["[3, 1]", "layers: [3, 1]\nmodel: tiny\n"])
def test_layers_from_a_yaml_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "layers.yaml"
    file.write_text(text)
    assert read_layers(str(file)) == (3, 1) and frozen(ShortV(layers=str(file)), geometry()) == [1, 3]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"layers: 3", "must be a list of layer numbers"),
        (b"[1, [", "not a readable YAML file"),
        (b"\xff\xfe\x00", "not a readable YAML file"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, match: str) -> None:
    file = tmp_path / "layers.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_layers(str(file))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="neither a preset nor a file; did you mean 'llava-1.5-7b'"):
        ShortV(layers="llava-15-7b").steps(geometry())
    with pytest.raises(ValueError, match="names a layer twice"):
        ShortV(layers=(1, 1))
    with pytest.raises(ValueError, match="must be a list of layer numbers"):
        ShortV(layers=(1.5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 32 is out of range: this LLM has 32 layers, 0 to 31"):
        ShortV(layers=(32,)).steps(geometry())
    with pytest.raises(ValueError, match="first=9 is more than the 2 layers"):
        ShortV(layers=(1, 2), first=9).steps(geometry())
    with pytest.raises(ValueError, match="first must be at least 0"):
        ShortV(first=-1)
    with pytest.raises(TypeError, match="first must be an integer"):
        ShortV(first=True)
    with pytest.raises(ValueError, match="shortv: has no budget"):
        ShortV(keep=5)


def test_settings_survive_json() -> None:
    method = ShortV(layers=(3, 1), first=1)
    assert ShortV(**json.loads(json.dumps(asdict(method)))) == method
