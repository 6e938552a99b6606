"""The node for ComfyUI, called as ComfyUI does: the file imported by its path, the method by its name, by keywords."""

import importlib.util
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT, ROOT, call_within
from isonext.data import images
from isonext.errors import UserError

NODE = ROOT / "examples/comfyui/isonext_node.py"
DEFAULTS = {"source": "cold", "target": "warm", "strength": 1.0, "cfg_scale": -1.0, "num_steps": 2}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("custom_nodes_isonext", NODE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def run(module):
    """A function: the node's inputs, its defaults changed by keywords -> its outputs."""

    def call(**inputs) -> tuple:
        node = module.NODE_CLASS_MAPPINGS["IsoNextStyleTransfer"]
        with torch.inference_mode():  # as ComfyUI has it
            return getattr(node(), node.FUNCTION)(**DEFAULTS | inputs)

    return call


def test_the_node_has_what_comfyui_looks_for(module):
    assert len(NODE.read_text().splitlines()) < 100
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in module.NODE_CLASS_MAPPINGS.values():
        kinds = node.INPUT_TYPES()
        assert node.RETURN_TYPES == ("IMAGE",) and isinstance(node.CATEGORY, str)
        inputs = kinds["required"] | kinds["optional"]
        assert [*inputs] == [*inspect.signature(getattr(node, node.FUNCTION)).parameters][1:]
        for kind, *options in inputs.values():
            assert kind in ("IMAGE", "STRING", "FLOAT", "INT")
            for option in options:
                assert kind == "STRING" or option["min"] <= option["default"] <= option["max"]


def test_a_batch_comes_out_as_inference_py_makes_each_picture(studio, within, run):
    pictures = [images.open_picture(studio / f"raw_data/cold/00{number}.png") for number in (3, 4)]
    image = torch.stack([torch.from_numpy(np.asarray(picture).astype(np.float32) / 255) for picture in pictures])
    (result,) = run(image=image, model=str(studio / CHECKPOINT))
    assert result.shape == (2, 32, 32, 3) and result.dtype == torch.float32
    for number, row in zip((3, 4), result, strict=True):
        flags = ("--input", f"raw_data/cold/00{number}.png", "--output", "node.png", "--num_steps", "2")
        styles = ("--source_style", "cold", "--target_style", "warm")
        assert within("inference", "--checkpoint", CHECKPOINT, *flags, *styles)[0] == 0
        expected = np.asarray(images.open_picture(studio / "node.png"))
        assert (row.mul(255).round().to(torch.uint8).numpy() == expected).all()


def test_settings_reach_the_transfer_and_alpha_is_left_out(studio, run):
    image = torch.rand(1, 20, 28, 4, generator=torch.Generator().manual_seed(0))
    kept = run(image=image, model=str(studio / CHECKPOINT), strength=0.0)[0]
    assert kept.shape == (1, 20, 28, 3)
    assert torch.equal(kept, run(image=image[..., :3], model=str(studio / CHECKPOINT), strength=0.0)[0])
    full, scaled = (run(image=image, model=str(studio / CHECKPOINT), cfg_scale=scale)[0] for scale in (-1.0, 4.0))
    assert not torch.equal(full, kept) and not torch.equal(full, scaled)


def test_a_model_that_is_not_there_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="gone: no such checkpoint"):
        run(image=torch.zeros(1, 8, 8, 3), model=str(tmp_path / "gone"))


def test_a_model_is_loaded_once_and_anew_where_it_was_exported_anew(studio, run, module, tmp_path):
    model = tmp_path / "m"
    assert call_within(studio, "export", "--checkpoint", CHECKPOINT, "--output", model)[0] == 0
    module.load.cache_clear()
    for hits in (0, 1):
        run(image=torch.zeros(1, 8, 8, 3), model=str(model))
        assert module.load.cache_info().hits == hits
    Image.new("RGB", (1, 1)).save(model / "new.png")
    run(image=torch.zeros(1, 8, 8, 3), model=str(model))
    assert module.load.cache_info().misses == 2
