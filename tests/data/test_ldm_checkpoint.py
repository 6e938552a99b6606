"""Checkpoint files of latent diffusion's layout, against its encoder and decoder written out here once more."""

import json
import math
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from helpers import call_within, draw_styles, refused
from isonext.data.autoencoder import load_autoencoder
from isonext.data.ldm_checkpoint import build
from isonext.data.store import read_meta
from isonext.errors import UserError

CPU = torch.device("cpu")

#################################################################################
#            The layout and the forward pass, from the papers' own code         #
#################################################################################


def block(name, before, after):
    """A res-block: two norms, two 3x3 convolutions, and a 1x1 one where the width changes."""
    parts = {
        f"{name}.norm1": (before,),
        f"{name}.conv1": (after, before, 3, 3),
        f"{name}.norm2": (after,),
        f"{name}.conv2": (after, after, 3, 3),
    }
    return parts | ({f"{name}.nin_shortcut": (after, before, 1, 1)} if before != after else {})


def attention(name, width):
    return {
        f"{name}.norm": (width,),
        **{f"{name}.{part}": (width, width, 1, 1) for part in ("q", "k", "v", "proj_out")},
    }


def middle(name, width):
    return (
        block(f"{name}.block_1", width, width)
        | attention(f"{name}.attn_1", width)
        | block(f"{name}.block_2", width, width)
    )


def layout(ch, mult, blocks, attends, z):
    """Layer -> shape of its weight; `attends` are the levels with attention. Every layer has a bias, too."""
    widths, last = [ch * m for m in mult], len(mult) - 1
    parts = {"encoder.conv_in": (ch, 3, 3, 3)}
    before = ch
    for level, width in enumerate(widths):
        for number in range(blocks):
            parts |= block(f"encoder.down.{level}.block.{number}", before, width)
            if level in attends:
                parts |= attention(f"encoder.down.{level}.attn.{number}", width)
            before = width
        if level != last:
            parts[f"encoder.down.{level}.downsample.conv"] = (width, width, 3, 3)
    parts |= middle("encoder.mid", before)
    parts |= {"encoder.norm_out": (before,), "encoder.conv_out": (2 * z, before, 3, 3)}
    parts |= {"quant_conv": (2 * z, 2 * z, 1, 1), "post_quant_conv": (z, z, 1, 1)}
    parts |= {"decoder.conv_in": (before, z, 3, 3)} | middle("decoder.mid", before)
    for level in range(last, -1, -1):
        for number in range(blocks + 1):
            parts |= block(f"decoder.up.{level}.block.{number}", before, widths[level])
            before = widths[level]
            if level in attends:
                parts |= attention(f"decoder.up.{level}.attn.{number}", before)
        if level:
            parts[f"decoder.up.{level}.upsample.conv"] = (before, before, 3, 3)
    return parts | {"decoder.norm_out": (before,), "decoder.conv_out": (3, before, 3, 3)}


def weights_of(parts, device="cpu"):
    """Random weights that keep the size of what goes through, so that no part is without effect."""
    generator, weights = torch.Generator().manual_seed(5), {}
    for name, shape in parts.items():
        if device == "meta":
            weights |= {
                f"{name}.weight": torch.empty(shape, device=device),
                f"{name}.bias": torch.empty(shape[0], device=device),
            }
            continue
        size = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
        weight = torch.randn(shape, generator=generator) * size + (len(shape) == 1)
        weights |= {f"{name}.weight": weight, f"{name}.bias": 0.3 * torch.randn(shape[0], generator=generator)}
    return weights


class Reference:
    """The original forward pass in float64, on a dict of weights by their original names."""

    def __init__(self, weights):
        self.weights = {key: value.double() for key, value in weights.items()}

    def has(self, start):
        return any(key.startswith(start + ".") for key in self.weights)

    def conv(self, name, x, **how):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def swish(self, x):
        return x * torch.sigmoid(x)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if self.has(f"{name}.nin_shortcut") else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, cells)
        share = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(q.shape[1])).softmax(-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", share, v).view_as(x))

    def level(self, name, x):
        number = 0
        while self.has(f"{name}.block.{number}"):
            x = self.block(f"{name}.block.{number}", x)
            x = self.attention(f"{name}.attn.{number}", x) if self.has(f"{name}.attn.{number}") else x
            number += 1
        return x

    def ends(self, part, x):
        return self.conv(f"{part}.conv_out", self.swish(self.norm(f"{part}.norm_out", x)), padding=1)

    def middle(self, name, x):
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def encode(self, pixels):
        """The mean of the posterior: the first half of the moments."""
        x, level = self.conv("encoder.conv_in", pixels.double(), padding=1), 0
        while self.has(f"encoder.down.{level}"):
            x = self.level(f"encoder.down.{level}", x)
            if self.has(f"encoder.down.{level}.downsample"):  # padded to the right and below, not around
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            level += 1
        return self.conv("quant_conv", self.ends("encoder", self.middle("encoder.mid", x))).chunk(2, 1)[0]

    def decode(self, latents):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents.double()), padding=1)
        x = self.middle("decoder.mid", x)
        for level in sorted(
            {int(key.split(".")[2]) for key in self.weights if key.startswith("decoder.up.")}, reverse=True
        ):
            x = self.level(f"decoder.up.{level}", x)
            if level:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.ends("decoder", x)


SMALL = layout(ch=32, mult=(1, 2, 2), blocks=2, attends={1, 2}, z=5)  # one level with attention is halved, one is not
EXTRA = {
    "loss.logvar": torch.zeros(()),
    "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
    "foundation_model.model.cls_token": torch.zeros(1, 1, 8),
    "linear_proj.weight": torch.zeros(8, 5, 1, 1),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
}


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def weights():
    return weights_of(SMALL)


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    """As a trainer leaves it: weights under state_dict, beside them what an autoencoder does without."""
    path = tmp_path_factory.mktemp("ldm") / "vae.ckpt"
    torch.save({"state_dict": OrderedDict(weights | EXTRA), "epoch": 3, "optimizer_states": [{"lr": 1e-4}]}, path)
    return path


#################################################################################
#                                What is loaded                                 #
#################################################################################


@pytest.mark.parametrize(
    ("ch", "mult", "blocks", "attends", "z"),
    [(32, (1, 2, 2), 2, {1, 2}, 5), (32, (1, 3), 1, set(), 4), (64, (1, 1, 1, 1), 1, {0, 3}, 2)],
)
def test_encoding_and_decoding_are_those_of_the_original_code(tmp_path, ch, mult, blocks, attends, z):
    weights = weights_of(layout(ch, mult, blocks, attends, z))
    torch.save(weights, tmp_path / "vae.pt")
    codec, reference, factor = load_autoencoder(str(tmp_path / "vae.pt"), CPU), Reference(weights), 2 ** (len(mult) - 1)
    assert (codec.name, codec.channels, codec.factor) == (str(tmp_path / "vae.pt"), z, factor)
    pixels, raw = noise(2, 3, 4 * factor, 6 * factor), noise(2, z, 4, 6)
    encoded, decoded = reference.encode(pixels), reference.decode(raw)
    assert encoded.shape == raw.shape and decoded.shape == pixels.shape
    assert encoded.std() > 0.1 and decoded.std() > 0.1
    torch.testing.assert_close(codec.encode(pixels), encoded.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(raw), decoded.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "parameters", "channels", "factor"),
    [
        ((128, (1, 1, 2, 2, 4), 2, {4}, 32), 69_836_067, 32, 16),  # VA-VAE f16d32: attention at 16 of 256 pixels
        ((128, (1, 2, 4, 4), 2, set(), 4), 83_653_863, 4, 8),  # Stable Diffusion's
    ],
)
def test_the_published_shapes_have_the_published_numbers_of_parameters(shape, parameters, channels, factor):
    weights = weights_of(layout(*shape), "meta")
    vae = build(weights, "vae.pt")
    assert sum(weight.numel() for weight in weights.values()) == parameters
    assert sum(parameter.numel() for parameter in vae.parameters()) == parameters
    assert (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)) == (channels, factor)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, None)


def old_format(tree, path):
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def halves(tree, path):
    torch.save({key: value.half() for key, value in tree.items()}, path)


@pytest.mark.parametrize(
    ("save", "name", "tolerance"),
    [(torch.save, "a.pt", 0), (old_format, "a.ckpt", 0), (save_file, "a.safetensors", 0), (halves, "a.pt", 0.03)],
)
def test_the_same_weights_in_any_kind_of_file_are_the_same_model(weights, file, tmp_path, save, name, tolerance):
    save(weights | EXTRA, tmp_path / name)
    pixels, codec = noise(1, 3, 16, 16), load_autoencoder(str(tmp_path / name), CPU)
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in codec.parameters()) and not codec.vae.training
    expected = load_autoencoder(str(file), CPU).encode(pixels)
    torch.testing.assert_close(codec.encode(pixels), expected, rtol=0, atol=tolerance)


def whole(weights, part):
    """A whole model's file: the autoencoder is one part of it."""
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.logit_scale": torch.zeros(())}
    return {f"{part}{key}": value for key, value in weights.items()} | others


@pytest.mark.parametrize("part", ["first_stage_model.", "vae."])
@pytest.mark.parametrize(("save", "name"), [(torch.save, "sd.ckpt"), (save_file, "sd.safetensors")])
def test_of_a_whole_model_the_autoencoder_is_taken(weights, file, tmp_path, part, save, name):
    save(whole(weights | EXTRA, part), tmp_path / name)
    codec = load_autoencoder(str(tmp_path / name), CPU)
    assert codec.digest == load_autoencoder(str(file), CPU).digest


def without_quant(weights):
    """FLUX's and Stable Diffusion 3's layout."""
    return {key: value for key, value in weights.items() if "quant_conv" not in key}


def test_a_file_without_the_convolutions_round_the_latents_is_the_model_in_which_they_do_nothing(weights, tmp_path):
    save_file(without_quant(weights), tmp_path / "ae.safetensors")
    same = weights | {"quant_conv.bias": torch.zeros(10), "post_quant_conv.bias": torch.zeros(5)}
    same |= {
        f"{name}.weight": torch.eye(n).view(n, n, 1, 1) for name, n in (("quant_conv", 10), ("post_quant_conv", 5))
    }
    codec, reference = load_autoencoder(str(tmp_path / "ae.safetensors"), CPU), Reference(same)
    pixels, raw = noise(2, 3, 16, 24), noise(2, 5, 4, 6)
    torch.testing.assert_close(codec.encode(pixels), reference.encode(pixels).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(raw), reference.decode(raw).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("part", "quant"), [("first_stage_model.", True), ("first_stage_model.", False), ("", False)])
def test_a_file_is_what_diffusers_from_single_file_makes_of_it(tmp_path, part, quant):
    """With attention in the middle alone, all that diffusers knows of."""
    import diffusers

    weights = weights_of(layout(32, (1, 2), 2, set(), 4))
    weights = weights if quant else without_quant(weights)
    path = tmp_path / "model.safetensors"
    save_file(whole(weights, part) if part else weights, path)
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(**sizes, **blocks, use_quant_conv=quant, use_post_quant_conv=quant)
    model.save_pretrained(tmp_path / "config/vae")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(path), config=str(tmp_path / "config"), subfolder="vae"
    ).eval()
    theirs.to(memory_format=torch.channels_last)  # as ours: another layout rounds otherwise
    ours, pixels, raw = load_autoencoder(str(path), CPU), noise(2, 3, 16, 24), noise(2, 4, 8, 12)
    with torch.inference_mode():
        torch.testing.assert_close(ours.encode(pixels), theirs.encode(pixels).latent_dist.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.decode(raw), theirs.decode(raw).sample, rtol=0, atol=1e-6)


#################################################################################
#                                What is refused                                #
#################################################################################


def line(path):
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(path), CPU)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def changed(weights, new=(), without=()):
    return {key: value for key, value in (weights | dict(new)).items() if key not in without}


SHAPE = "decoder.conv_in.weight has the shape [64, 4, 3, 3], not [64, 5, 3, 3]"


@pytest.mark.parametrize(
    ("new", "without", "found"),
    [
        ({}, ["encoder.down.1.attn.0.q.weight"], "the weight encoder.down.1.attn.0.q.weight is missing"),
        ({}, ["encoder.down.0.block.0.conv2.bias"], "the weight encoder.down.0.block.0.conv2.bias is missing"),
        ({}, ["post_quant_conv.bias"], "the weight post_quant_conv.bias is missing"),
        ({}, ["quant_conv.weight", "quant_conv.bias"], "2 weights are missing, e.g. quant_conv.weight"),
        ({"encoder.extra.weight": torch.zeros(1)}, [], "the weight encoder.extra.weight is unknown"),
        ({"losses": torch.zeros(1)}, [], "the weight losses is unknown"),
        ({"model_ema.encoderconv_inweight": torch.zeros(1)}, [], "model_ema.encoderconv_inweight is unknown"),
        ({"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)}, [], SHAPE),
        (
            {"encoder.down.1.attn.1.k.weight": torch.zeros(64, 64, 3, 3)},
            [],
            "has the shape [64, 64, 3, 3], not [64, 64]",
        ),
        ({"encoder.down.0.block.0.conv2.bias": torch.zeros(33)}, [], "[33, 64, 64] channels by level"),
        ({"epoch": 3}, [], "epoch is no weight"),
        ({3: torch.zeros(1)}, [], "the weight 3 is unknown"),
    ],
)
def test_a_weight_that_does_not_belong_or_is_missing_is_named(weights, tmp_path, new, without, found):
    torch.save({"state_dict": changed(weights, new, without)}, tmp_path / "vae.pt")
    assert line(tmp_path / "vae.pt").startswith(f"autoencoder {tmp_path / 'vae.pt'}: ")
    assert found in line(tmp_path / "vae.pt")
    assert "give a whole checkpoint of" in line(tmp_path / "vae.pt")


@pytest.mark.parametrize("tree", [torch.zeros(3), [1, 2], {"state_dict": 3}])
def test_a_file_of_other_data_is_refused(tmp_path, tree):
    torch.save(tree, tmp_path / "vae.pt")
    assert "holds no weights by name" in line(tmp_path / "vae.pt")


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
    ("save", "name"), [(torch.save, "cut.pt"), (old_format, "cut.ckpt"), (save_file, "cut.safetensors")]
)
def test_a_truncated_file_is_damaged(tmp_path, weights, save, name, part):
    path = tmp_path / name
    save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert "damaged, or not a VAE checkpoint" in line(path)


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (type(self.folder).mkdir, (self.folder,))


@pytest.mark.parametrize("save", [torch.save, old_format])
def test_a_file_with_code_in_it_is_not_run_and_the_line_says_what_to_do(tmp_path, weights, save):
    path, made = tmp_path / "evil.ckpt", tmp_path / "made"
    save({"state_dict": weights, "callbacks": Payload(made)}, path)
    said = line(path)
    assert "holds more than plain data, and was not run; if you trust it, save its state_dict alone" in said
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.is_dir(), "the payload was a live one"


@pytest.mark.parametrize("name", ["none.pt", "none.ckpt", "none.safetensors"])
def test_a_missing_checkpoint_is_not_looked_for_on_the_hub(tmp_path, name):
    assert line(tmp_path / name).startswith(f"autoencoder {tmp_path / name}: no such file; give a whole checkpoint of")


def test_a_folder_with_such_a_suffix_is_still_a_diffusers_folder(tmp_path):
    (tmp_path / "vae.pt").mkdir()
    assert "this folder does not load" in line(tmp_path / "vae.pt")


#################################################################################
#                              FLUX.2's own file                                #
#################################################################################

# The class's names in the file: scripts/convert_flux2_to_diffusers.py of diffusers, read backwards. So they are in
# black-forest-labs/flux2, src/flux2/autoencoder.py, too, whose halves have the convolutions round the latents.
FLUX2 = (
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    (".resnets.", ".block."),
    ("mid_block.block.0", "mid.block_1"),
    ("mid_block.block.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("samplers.0.", "sample."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (".to_out.0", ".proj_out"),
    *((f".to_{part}.", f".{part}.") for part in "qkv"),
)
NESTED = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}


def flux2(**more):
    """A small one of random weights, with statistics in its batch norm."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKLFlux2(
        **blocks, block_out_channels=(32, 64), layers_per_block=1, latent_channels=3, **more
    ).eval()
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 12))
    vae.bn.running_var.copy_(torch.linspace(0.1, 3, 12))
    return vae


def flux2_file(vae, nested=True):
    """Its weights by the names of FLUX.2's own file, attention as 1x1 convolutions; ComfyUI's have no nested names."""
    weights = {}
    for key, value in vae.state_dict().items():
        if key.startswith("decoder.up_blocks."):  # two levels, numbered from the other end
            key = f"decoder.up_blocks.{1 - int(key[18])}{key[19:]}"
        for theirs, own in FLUX2:
            key = key.replace(theirs, own)
        for theirs, own in NESTED.items() if nested else ():
            key = f"{own}{key.removeprefix(theirs)}" if key.startswith(theirs) else key
        weights[key] = value[..., None, None].contiguous() if ".attn_1." in key and value.dim() == 2 else value
    return weights


COUNTER = ["bn.num_batches_tracked"]


@pytest.mark.parametrize(
    ("more", "nested", "left_out"),
    [
        ({}, True, []),
        ({}, False, COUNTER),
        ({"decoder_block_out_channels": (32, 32)}, True, COUNTER),  # FLUX.2's small decoder
        ({"use_quant_conv": False, "use_post_quant_conv": False}, True, []),
    ],
)
@pytest.mark.parametrize("part", ["", "vae."])
def test_flux2s_own_file_is_diffusers_class_with_its_statistics(tmp_path, more, nested, left_out, part):
    vae, path = flux2(**more), tmp_path / "ae.safetensors"
    save_file({f"{part}{key}": value for key, value in changed(flux2_file(vae, nested), (), left_out).items()}, path)
    codec = load_autoencoder(str(path), CPU)
    assert (type(codec.vae).__name__, codec.channels, codec.factor) == ("AutoencoderKLFlux2", 12, 4)
    assert "decoder.up.1.upsample.conv.weight" in flux2_file(vae), "the names are those of the file"
    vae.save_pretrained(tmp_path / "folder")
    assert codec.digest == load_autoencoder(str(tmp_path / "folder"), CPU).digest, "a store of one is one of the other"
    vae.to(memory_format=torch.channels_last)  # as ours: another layout rounds otherwise
    pixels, latents = noise(2, 3, 16, 24), noise(2, 12, 4, 6)
    mean, deviation = torch.linspace(-1, 1, 12), (torch.linspace(0.1, 3, 12) + 1e-4).sqrt()
    mean, deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
    with torch.inference_mode():
        z = vae.encode(pixels).latent_dist.mean.view(2, 3, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 4, 6)
        raw = (latents * deviation + mean).view(2, 3, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 12)
        encoded, decoded = (z - mean) / deviation, vae.decode(raw).sample
        torch.testing.assert_close(codec.vae.decode(raw).sample, decoded, rtol=1e-6, atol=1e-6)
    assert encoded.std() > 0.1 and decoded.std() > 0.1
    torch.testing.assert_close(codec.encode(pixels), encoded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=1e-5, atol=1e-5)  # raw rounds otherwise


def test_flux2s_published_shape_is_diffusers_default():
    import diffusers

    parts = layout(128, (1, 2, 4, 4), 2, set(), 32)
    weights = weights_of({NESTED.get(key, key): shape for key, shape in parts.items()}, "meta")
    weights |= {f"bn.running_{part}": torch.empty(128, device="meta") for part in ("mean", "var")}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLFlux2()
    ours = build(weights, "ae.safetensors")
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert (ours.bn.eps, ours.config.latent_channels) == (1e-4, 32)


def test_where_diffusers_does_not_know_flux2_yet_the_line_says_so(tmp_path, monkeypatch):
    import diffusers

    save_file(flux2_file(flux2()), tmp_path / "ae.safetensors")
    monkeypatch.setattr(diffusers, "AutoencoderKLFlux2", lambda block_out_channels: None)  # one of before
    assert line(tmp_path / "ae.safetensors").endswith(
        f"is FLUX.2's, which diffusers {diffusers.__version__} does not know; update it"
    )


@pytest.mark.parametrize(
    ("new", "without", "found"),
    [
        ({}, ["bn.running_var"], "the weight bn.running_var is missing"),
        ({}, ["bn.running_mean"], "the weight bn.running_mean is missing"),
        ({"bn.running_mean": torch.zeros(3)}, [], "bn.running_mean has the shape [3], not [12]"),
        ({"bn.weight": torch.zeros(12)}, [], "the weight bn.weight is unknown"),
        ({"bn.running_var": -torch.ones(12)}, [], "bn.running_var has numbers below 0"),
        ({"bn.running_var": torch.full((12,), torch.nan)}, [], "bn.running_var has numbers below 0"),
        ({}, ["decoder.post_quant_conv.bias"], "the weight post_quant_conv.bias is missing"),
        ({}, ["decoder.up.1.block.0.conv2.bias"], "the weight decoder.up.1.block.0.conv2.bias is missing"),
    ],
)
def test_a_weight_of_flux2s_file_that_does_not_belong_or_is_missing_is_named(tmp_path, new, without, found):
    save_file(changed(flux2_file(flux2()), new, without), tmp_path / "ae.safetensors")
    assert found in line(tmp_path / "ae.safetensors")


#################################################################################
#                                 The commands                                  #
#################################################################################


TINY = {
    "model": {"hidden_dim": 8, "num_layers": 1, "num_groups": 4, "style_dim": 8, "time_dim": 8},
    "training": {"stage1_epochs": 1, "num_workers": 0, "compile": False, "batch_size": 2},
    "data": {"image_size": 32, "val_fraction": 0.0, "flip": False},
}


@pytest.fixture
def folder(tmp_path, file):
    """Pictures, a checkpoint file and a config, as a user has them at the start."""
    draw_styles(tmp_path / "raw_data", 2)
    shutil.copy(file, tmp_path / "vae.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_pictures_are_encoded_trained_on_and_decoded_by_the_file_that_the_store_names(folder, weights):
    status, out, err = call_within(
        folder, "preprocess_latents", "--set", "autoencoder.name=vae.ckpt", "--device", "cpu"
    )
    assert status == 0 and "latents: 4 encoded, 0 kept, 0 removed" in out, err
    spec = read_meta(folder / "latents").latents
    assert (spec.autoencoder, spec.channels, spec.factor) == ("vae.ckpt", 5, 4)
    picture = torch.tensor(np.array(Image.open(folder / "raw_data/cold/000.png"))) / 127.5 - 1
    stored = torch.load(folder / "latents/cold/000.png.pt", weights_only=True)["latent"]
    mean = Reference(weights).encode(picture.permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(stored, mean.float(), rtol=1e-4, atol=1e-4)

    assert call_within(folder, "train")[0] == 0  # the autoencoder is the store's, whatever the config says
    flags = ("--source_style", "cold", "--target_style", "warm", "--device", "cpu", "--num_steps", "2")
    picture = ("--input", "raw_data/cold/000.png", "--output", "out.png")
    status, _, err = call_within(folder, "inference", "--checkpoint", "checkpoints/stage1_epoch1.pt", *picture, *flags)
    assert status == 0, err
    assert Image.open(folder / "out.png").size == (32, 32)


def test_a_bad_file_ends_the_command_with_one_line_and_no_store(folder, weights):
    torch.save({**weights, "encoder.more.weight": torch.zeros(1)}, folder / "bad.pt")
    refused(
        call_within(folder, "preprocess_latents", "--set", "autoencoder.name=bad.pt"), "encoder.more.weight is unknown"
    )
    assert not (folder / "latents").exists()
