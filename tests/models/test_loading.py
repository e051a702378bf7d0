"""Loading: what cannot be loaded is refused before gigabytes are read, with what to do instead."""

import json
import shutil

import pytest
import torch

from tests.embedded import random_checkpoint
from vtr.models import loading
from vtr.models.loading import check_attention, check_device, check_dtype, find_checkpoint, identify, load_model
from vtr.types import VtrError


@pytest.fixture
def copy(tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(random_checkpoint(), tmp_path / "copy")


def test_a_folder_loads_with_its_processor():
    model, processor = load_model(str(random_checkpoint()))
    assert model.config.model_type == "llava"
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "float16", "float64"])
def test_dtypes(dtype):
    wanted = {"bf16": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    assert load_model(str(random_checkpoint()), dtype=dtype)[0].dtype == wanted


def test_attention_backend_is_the_one_asked_for():
    assert load_model(str(random_checkpoint()), attention="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"attention: unknown backend 'flash'; one of sdpa, eager, flash_attention_2"):
        check_attention("flash")


def test_auto_dtype_is_float32_on_the_cpu_and_the_checkpoints_own_elsewhere():
    config = loading.load_config(find_checkpoint(str(random_checkpoint())))
    assert check_dtype("auto", "cpu", config) == torch.float32
    assert check_dtype("auto", "cuda", config) == torch.float16
    with pytest.raises(ValueError, match=r"dtype: unknown name 'int3'; one of auto, float32"):
        check_dtype("int3", "cpu", config)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check_device("cpu") == "cpu"
    assert check_device("auto") == "auto"
    for name in ("cuda", "cuda:7", "cpu:3", "meta"):
        with pytest.raises(ValueError, match=rf"device: '{name}' does not exist on this machine; here are cpu"):
            check_device(name)
    with pytest.raises(ValueError, match="device: unknown name 'gpu'; here are cpu"):
        check_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2' does not exist on this machine; here are cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


def test_names_are_folders_recipes_or_hub_ids(tmp_path, monkeypatch):
    assert find_checkpoint("llava-1.5-7b").source == "llava-hf/llava-1.5-7b-hf"
    assert find_checkpoint("llava-hf/llava-1.5-7b-hf").name == "llava-1.5-7b-hf"
    with pytest.raises(ValueError, match=r"model: unknown name 'llava-1.5-7'; did you mean 'llava-1.5-7b'"):
        find_checkpoint("llava-1.5-7")
    for path in ("./gone", str(tmp_path / "gone"), "a/b/c"):
        with pytest.raises(ValueError, match="model: no folder"):
            find_checkpoint(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="model: no folder 'models/gone'"):
        find_checkpoint("models/gone")


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights \(\*.safetensors or \*.bin\); copy or download them there"):
        load_model(str(copy))


def test_a_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a Hugging Face checkpoint"):
        load_model(str(copy))


@pytest.mark.parametrize("model_type", ["bert", "made_up", None])
def test_an_unsupported_model_type_is_refused_before_loading(copy, model_type):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ValueError, match=rf"has model type {model_type!r}, for which there is no host; known: .*llava"):
        load_model(str(copy))


def test_damaged_files_are_refused(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded: "):
        load_model(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON .*; the checkpoint is damaged"):
        load_model(str(copy))


def test_missing_tensors_are_refused_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if "q_proj" in n)
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, first '.*q_proj.weight'; get them again"):
        load_model(str(copy))


def test_identity_follows_the_content_and_not_the_place_or_the_card(copy):
    def of(folder):
        return identify(find_checkpoint(str(folder)))["sha256"]

    before = of(copy)
    assert before == of(random_checkpoint())
    (copy / "README.md").write_text("card")
    assert of(copy) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert of(copy) != before


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    def away(*arguments, **settings):
        asked.append(arguments)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    monkeypatch.setattr(huggingface_hub.utils._http, "http_backoff", away)
    with pytest.raises(VtrError, match="config of 'nobody/nothing' cannot be read: .*; check the id and the network, or give a folder"):
        load_model("nobody/nothing")
    assert len(asked) == 1


def test_flash_attention_that_cannot_be_used_names_what_to_use():
    if pytest.importorskip("transformers.utils").is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(
        ValueError, match=r"attention: 'flash_attention_2' cannot be used here; use 'sdpa', or install the package flash-attn"
    ):
        load_model(str(random_checkpoint()), attention="flash_attention_2")
