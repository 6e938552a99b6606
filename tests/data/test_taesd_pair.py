"""TAESD's own pairs of files, against its layers written out here once more, and against diffusers' AutoencoderTiny."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from helpers import ROOT
from isonext.data.autoencoder import load_autoencoder
from isonext.errors import UserError

CPU = torch.device("cpu")
WEIGHTS = ROOT.parent / "shared" / "weights"

# Layers in order, by the author's code; a layer's name is its number. `pool` is a block that pools.
UP, DOWN, POOL = ["block"] * 3 + ["up", "thin"], ["down"] + ["block"] * 3, ["down"] + ["pool"] * 3
ENDS = ["block", "conv"]
ENCODERS = {
    "taesd": ["conv", "block", *DOWN * 3, "conv"],
    "taef2": ["conv", "block", *DOWN * 2, *POOL, "conv"],
    "taesana": ["half", "relu", "half", "relu", "block", *DOWN * 3, "conv"],
}
DECODERS = {
    "taesd": ["clamp", "conv", "relu", *UP * 3, *ENDS],
    "taef2": ["clamp", "conv", "relu", *["pool"] * 3, "up", "thin", *UP * 2, *ENDS],
    "taesana": ["clamp", "conv", "relu", *UP * 5, *ENDS],
}
WIDTHS = {  # channels behind each convolution outside of blocks
    ("taesd", "encoder"): [64, 64, 64, 64, 4],
    ("taesd", "decoder"): [64, 64, 64, 64, 3],
    ("taef2", "encoder"): [64, 64, 64, 64, 32],
    ("taef2", "decoder"): [64, 64, 64, 64, 3],
    ("taesana", "encoder"): [32, 64, 64, 64, 64, 32],
    ("taesana", "decoder"): [256, 128, 64, 64, 64, 64, 3],
}
LATENT = {"taesd": (4, 8), "taef2": (32, 8), "taesana": (32, 32)}


def plan(kind, part):
    return (ENCODERS if part == "encoder" else DECODERS)[kind]


def weights_of(kind, part):
    generator, weights = torch.Generator().manual_seed(3), {}
    before, widths = 3 if part == "encoder" else LATENT[kind][0], iter(WIDTHS[kind, part])

    def add(name, after, before, side, bias=True):
        size = 1 / math.sqrt(before * side * side)
        weights[f"{name}.weight"] = torch.randn(after, before, side, side, generator=generator) * size
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(after, generator=generator)

    for number, layer in enumerate(plan(kind, part)):
        if layer in ("conv", "half", "down", "thin"):
            after = next(widths)
            add(number, after, before, 3, layer not in ("down", "thin"))
            before = after
        if layer in ("block", "pool"):
            for inner in (0, 2, 4):
                add(f"{number}.conv.{inner}", before, before, 3)
        if layer == "pool":
            add(f"{number}.pool.0", 4 * before, before, 1, bias=False)
            add(f"{number}.pool.3", before, 4 * before, 1, bias=False)
            for name in ("weight", "bias"):
                weights[f"{number}.pool.1.{name}"] = torch.rand(4 * before, generator=generator)
    return weights


def run(kind, part, weights, x):
    """The layers in float64."""
    weights = {key: value.double() for key, value in weights.items()}

    def conv(name, x, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    x = x.double()
    for number, layer in enumerate(plan(kind, part)):
        if layer in ("conv", "thin"):
            x = conv(number, x, padding=1)
        elif layer in ("half", "down"):
            x = conv(number, x, padding=1, stride=2)
        elif layer == "relu":
            x = x.relu()
        elif layer == "clamp":
            x = torch.tanh(x / 3) * 3
        elif layer == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        else:
            if layer == "pool":
                wide = F.group_norm(
                    conv(f"{number}.pool.0", x), 4, *(weights[f"{number}.pool.1.{n}"] for n in ("weight", "bias"))
                )
                x = x + conv(f"{number}.pool.3", wide.relu())
            y = conv(f"{number}.conv.0", x, padding=1).relu()
            y = conv(f"{number}.conv.2", y, padding=1).relu()
            x = (x + conv(f"{number}.conv.4", y, padding=1)).relu()
    return x


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_pair(folder, kind, save=torch.save, suffix=".pth"):
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        save(weights_of(kind, part), folder / f"{kind}_{part}{suffix}")
    return folder / f"{kind}_encoder{suffix}"


@pytest.mark.parametrize("kind", LATENT)
def test_a_pair_is_the_network_of_its_author_with_pixels_from_zero_to_one(tmp_path, kind):
    path = save_pair(tmp_path, kind)
    codec, (channels, factor) = load_autoencoder(str(path), CPU), LATENT[kind]
    assert (codec.name, codec.channels, codec.factor) == (str(path), channels, factor)
    pixels, latents = noise(2, 3, 2 * factor, 3 * factor), 3 * noise(2, channels, 2, 3)
    encoded = run(kind, "encoder", weights_of(kind, "encoder"), pixels / 2 + 0.5)
    decoded = run(kind, "decoder", weights_of(kind, "decoder"), latents) * 2 - 1
    assert encoded.std() > 0.1 and decoded.std() > 0.1
    # 15 to 25 layers of sums over 576 numbers in float32
    torch.testing.assert_close(codec.encode(pixels), encoded.float(), rtol=1e-4, atol=1e-4 * encoded.abs().max().item())
    torch.testing.assert_close(
        codec.decode(latents), decoded.float(), rtol=1e-4, atol=1e-4 * decoded.abs().max().item()
    )


@pytest.mark.parametrize(("save", "suffix"), [(torch.save, ".pth"), (save_file, ".safetensors")])
def test_either_file_in_either_format_is_the_same_pair(tmp_path, save, suffix):
    path = save_pair(tmp_path / "one", "taef2", save, suffix)
    digest = load_autoencoder(str(path), CPU).digest
    assert load_autoencoder(str(path).replace("encoder", "decoder"), CPU).digest == digest
    assert load_autoencoder(str(save_pair(tmp_path / "two", "taef2")), CPU).digest == digest


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_the_pair_of_the_pretrained_folder_is_that_folder(tmp_path, name):
    import diffusers

    if not (WEIGHTS / name).is_dir():
        pytest.skip(f"../shared/weights/{name} is not there")
    state = diffusers.AutoencoderTiny.from_pretrained(WEIGHTS / name).state_dict()
    for part, first in (("encoder", 0), ("decoder", 1)):  # the clamp, a layer here, has no number in diffusers
        keys = {key: key.removeprefix(f"{part}.layers.").split(".", 1) for key in state if key.startswith(part)}
        torch.save(
            {f"{int(n) + first}.{rest}": state[key] for key, (n, rest) in keys.items()}, tmp_path / f"a_{part}.pth"
        )
    pair, folder = load_autoencoder(str(tmp_path / "a_encoder.pth"), CPU), load_autoencoder(str(WEIGHTS / name), CPU)
    pixels = noise(1, 3, 64, 48)
    torch.testing.assert_close(pair.encode(pixels), folder.encode(pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        pair.decode(folder.encode(pixels)), folder.decode(folder.encode(pixels)), rtol=0, atol=1e-5
    )


def broken(folder, part, change):
    weights = weights_of("taef2", part)
    change(weights)
    torch.save(weights, folder / f"taef2_{part}.pth")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("encoder", lambda w: w.pop("3.conv.0.bias"), "taef2_encoder.pth: the weight 3.conv.0.bias is missing"),
        ("decoder", lambda w: w.pop("1.weight"), "taef2_decoder.pth: the weight 1.weight is missing"),
        ("decoder", lambda w: w.update({"99.weight": torch.zeros(1)}), "decoder.pth: the weight 99.weight is unknown"),
        (
            "encoder",
            lambda w: w.update({"14.bias": torch.zeros(31)}),
            r"14.weight has the shape \[32, 64, 3, 3\], not \[31,",
        ),
        ("decoder", lambda w: w.update({"1.bias": 3}), "1.bias is no weight"),
        (
            "decoder",
            lambda w: [w.pop(key) for key in list(w) if "pool" in key],
            "12 weights are missing, e.g. 3.pool.0",
        ),
    ],
)
def test_a_weight_that_does_not_belong_or_is_missing_is_named(tmp_path, part, change, message):
    path = save_pair(tmp_path, "taef2")
    broken(tmp_path, part, change)
    with pytest.raises(UserError, match=message) as caught:
        load_autoencoder(str(path), CPU)
    assert "\n" not in str(caught.value)


def test_a_file_without_its_other_half_says_where_to_put_it(tmp_path):
    path = save_pair(tmp_path, "taesd")
    (tmp_path / "taesd_decoder.pth").unlink()
    with pytest.raises(UserError, match=r"is the encoder of a TAESD, .* put it there as taesd_decoder\.pth$"):
        load_autoencoder(str(path), CPU)
    shutil.move(path, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=r"put it there as NAME_decoder\.pth, and call this one NAME_encoder\.pth"):
        load_autoencoder(str(tmp_path / "mine.pth"), CPU)
