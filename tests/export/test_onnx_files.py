"""--format onnx: ONNX Runtime gives the numbers of PyTorch, on other sizes and batches than the traced ones."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import CHECKPOINT, ROOT, call_within, refused
from isonext.checkpoint import load_checkpoint, load_model
from isonext.data.autoencoder import DctCodec
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.export import onnx_files
from isonext.export.onnx_files import Part, autoencoder_parts, network_part, write_part
from isonext.models.dit import DiT
from isonext.pipeline import load_pipeline, transfer_settings

CPU = torch.device("cpu")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx_files.PACKAGES), reason="requirements/export.txt"
)


@pytest.fixture(scope="module")
def exported(studio, tmp_path_factory):
    """(folder, what the command printed) of the studio's checkpoint, whose own places are all absolute paths."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    tree = torch.load(studio / CHECKPOINT, weights_only=True)
    tree["config"]["checkpoint"]["save_dir"] = f"{studio}/checkpoints"
    torch.manual_seed(0)
    for weight in tree["ema"].values():  # further from its start than a few steps have brought it
        weight.add_(torch.randn_like(weight), alpha=0.1)
    torch.save(tree, folder.parent / "a.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "TIMED_S", 0.05)
        flags = ("--checkpoint", folder.parent / "a.pt", "--output", folder, "--format", "onnx")
        status, out, err = call_within(studio, "export", *flags)
    assert status == 0, err
    return folder, out


def run_file(path: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, inputs)[0]


def rms(a: np.ndarray, b: torch.Tensor) -> float:
    return float(np.sqrt(np.square(a.astype(np.float64) - b.double().numpy()).mean()))


@needs_onnx
def test_the_files_give_the_numbers_of_pytorch_at_any_size(exported):
    folder, source = exported[0], exported[0].parent / "a.pt"
    checkpoint = load_checkpoint(source)
    pipeline, _ = load_pipeline(source, CPU)
    model = load_model(checkpoint, source, CPU)
    torch.manual_seed(1)
    for batch, (height, width) in ((1, (8, 8)), (5, (3, 11))):
        x, t, style = torch.randn(batch, 12, height, width), torch.rand(batch), torch.arange(batch) % 3
        with torch.no_grad():
            expected = model(x, t, style)
        assert expected.std() > 0.1, "a network that says something"
        found = run_file(folder / "velocity.onnx", x=x.numpy(), t=t.numpy(), style=style.numpy())
        assert found.shape == expected.shape and rms(found, expected) < 1e-4
        pixels = torch.rand(batch, 3, 4 * height, 4 * width) * 2 - 1
        latents = pipeline.encode(pixels)
        assert rms(run_file(folder / "encoder.onnx", pixels=pixels.numpy()), latents) < 1e-4
        back = pipeline.decode(latents, 4 * height, 4 * width)
        assert rms(run_file(folder / "decoder.onnx", latents=latents.numpy()), back) < 1e-4


@needs_onnx
def test_the_command_says_size_difference_and_speed_of_each_file(exported):
    folder, out = exported
    for name in ("velocity", "encoder", "decoder"):
        said = re.search(
            rf"{name}\.onnx: (.*) MB, opset (\d+), (.*) \(rms\) off PyTorch, (.*) pictures a second \(", out
        )
        assert said and float(said[3]) < 1e-3 and float(said[4]) > 1
        assert float(said[1]) == pytest.approx((folder / f"{name}.onnx").stat().st_size / 1e6, rel=0.01)
        assert said[0].rpartition(": ")[2][:20] in (folder / "README.md").read_text()
    tree = json.loads((folder / "config.json").read_text())
    assert tree["latents"]["styles"] == ["cold", "warm"] and len(tree["latents"]["mean"]) == 12


@needs_onnx
def test_no_path_of_this_machine_is_in_any_file(exported, studio):
    files = sorted(exported[0].iterdir())
    assert {path.suffix for path in files} >= {".onnx", ".json", ".md"}
    for path in files:
        for secret in (str(studio), str(exported[0].parent), str(ROOT), "site-packages", ".py"):
            assert secret.encode() not in path.read_bytes() or (path.suffix == ".md" and secret == ".py"), path


@needs_onnx
def test_the_page_s_transfer_in_numpy_is_that_of_the_network(exported, studio, monkeypatch):
    """The block of docs/export.md, as it stands, against Euler's method of the pipeline."""
    page = (ROOT / "docs/export.md").read_text()
    block = next(text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in text)
    block = (
        block.replace('"models/painter_onnx', f'"{exported[0]}')
        .replace('"photo"', '"cold"')
        .replace('"painting"', '"warm"')
    )
    monkeypatch.chdir(studio)
    block = block.replace('"cat.png"', '"raw_data/cold/003.png"').replace('"cat_painted.png"', '"numpy.png"')
    names: dict = {}
    exec(compile(block, "docs/export.md", "exec"), names)
    pipeline, config = load_pipeline(exported[0].parent / "a.pt", CPU)
    pipeline.bf16 = False
    config.inference.method, config.inference.num_steps, config.inference.cfg_scale = "euler", 10, 1.0
    pixels = torch.from_numpy(names["pixels"])
    done = pipeline.transfer(pipeline.encode(pixels), 0, 1, transfer_settings(config.inference))
    assert rms(names["x"], done.latents) < 1e-3
    assert (studio / "numpy.png").exists()


#################################################################################
#                               What cannot be had                              #
#################################################################################


@needs_onnx
@pytest.mark.parametrize("opset", [7, 99])
def test_an_opset_that_is_not_there_is_one_line_before_any_work(within, opset, monkeypatch):
    monkeypatch.setattr("isonext.export.folder.load_checkpoint", None)
    result = within("export", "--checkpoint", CHECKPOINT, "--output", "none", "--format", "onnx", "--opset", opset)
    refused(result, f"--opset {opset}: there is 18 to")


@needs_onnx
def test_an_opset_that_torch_does_not_reach_is_one_line(tmp_path, monkeypatch):
    part = Part("scale", "", Doubled(), lambda batch, cells: {"x": torch.ones(batch, 2)}, {"x": {0: "batch"}}, "y")
    assert "opset 18," in write_part(part, tmp_path / "a.onnx", 18, (1, 1))
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **named: export(*args, **named | {"opset_version": 18}))
    with pytest.raises(UserError, match="--opset 19: torch cannot write scale with it, but with 18"):
        write_part(part, tmp_path / "b.onnx", 19, (1, 1))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Unlike(Doubled):
    """Another function once it was traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0 if torch.compiler.is_compiling() else 1)


@needs_onnx
def test_a_file_that_gives_other_numbers_is_refused(tmp_path):
    part = Part("scale", "", Unlike(), lambda batch, cells: {"x": torch.ones(batch, 2)}, {"x": {0: "batch"}}, "y")
    with pytest.raises(UserError, match=r"a\.onnx: ONNX Runtime is 1\.0e\+00 \(rms\) off PyTorch"):
        write_part(part, tmp_path / "a.onnx", None, (1, 1))


@needs_onnx
def test_an_autoencoder_that_cannot_be_had_is_told_and_the_network_is_there(studio, within, monkeypatch, tmp_path):
    def fail(self, latents):
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(DctCodec, "decode", fail)
    network = Part(
        "velocity", "", Doubled(), lambda batch, cells: {"x": torch.ones(batch, 2)}, {"x": {0: "batch"}}, "y"
    )
    monkeypatch.setattr(onnx_files, "network_part", lambda *_: network)
    monkeypatch.setattr(onnx_files, "TIMED_S", 0.01)
    flags = ("--checkpoint", CHECKPOINT, "--output", tmp_path / "m", "--format", "onnx")
    monkeypatch.setattr("isonext.export.folder.draw_samples", lambda *_: "none")
    status, out, err = within("export", *flags)
    assert status == 1 and re.search(r"decoder\.onnx: cannot be had as ONNX \(.*\); left out", out), err
    assert {path.name for path in (tmp_path / "m").glob("*.onnx")} == {"velocity.onnx", "encoder.onnx"}


@needs_onnx
def test_a_network_that_cannot_be_had_is_one_line_and_no_folder(within, monkeypatch, tmp_path):
    def fail(*_args, **_named):
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    flags = ("--checkpoint", CHECKPOINT, "--output", tmp_path / "m", "--format", "onnx")
    refused(within("export", *flags), "velocity.onnx: cannot be had as ONNX (no such operator)")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", onnx_files.PACKAGES)
def test_a_missing_package_is_one_line_that_says_what_to_install(within, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *more: None if wanted == name else find(wanted, *more)
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    result = within("export", "--checkpoint", CHECKPOINT, "--output", "none", "--format", "onnx")
    refused(result, "--format onnx needs ", name, "pip install -r requirements/export.txt")


#################################################################################
#                               Other networks                                  #
#################################################################################


@needs_onnx
@pytest.mark.slow
def test_a_transformer_goes_too_at_its_one_size(tmp_path):
    torch.manual_seed(0)
    spec = LatentSpec("dct:f4c12", 12, 4, 32, ["a", "b"], mean=[0.0] * 12, std=[1.0] * 12)
    model = DiT(12, 2, size=(8, 8), hidden_dim=32, num_layers=2, num_heads=2).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    part = network_part(model, spec)
    assert part.axes["x"] == {0: "batch"} and part.inputs(3, (5, 9))["x"].shape == (3, 12, 8, 8)
    assert "off PyTorch" in write_part(part, tmp_path / "a.onnx", None, spec.space)


@needs_onnx
@pytest.mark.slow
def test_a_vae_goes_too(tmp_path):
    from diffusers import AutoencoderTiny

    from isonext.data.autoencoder import load_autoencoder

    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    AutoencoderTiny(**small, num_decoder_blocks=(1, 1), latent_channels=4).save_pretrained(tmp_path / "vae")
    codec = load_autoencoder(str(tmp_path / "vae"), CPU)
    codec.bf16_encode = codec.bf16_decode = False
    spec = LatentSpec("vae", 4, codec.factor, 32, ["a", "b"], mean=[0.5] * 4, std=[2.0] * 4)
    for part in autoencoder_parts(codec, spec):
        assert "off PyTorch" in write_part(part, tmp_path / f"{part.name}.onnx", None, spec.space)
