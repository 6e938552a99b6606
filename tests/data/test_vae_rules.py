"""Every picture autoencoder of diffusers: what the adapter makes of it, against its pipeline's arithmetic."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import ROOT, TINY, call_within, draw_styles, refused
from isonext.data.autoencoder import load_autoencoder, weights_digest
from isonext.data.store import LatentSpec, read_meta
from isonext.data.vae_rules import REFUSED, RULES
from isonext.errors import UserError
from isonext.pipeline import Pipeline
from small_vaes import MEAN, SMALL, STD, save_small, small_vae

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A name of SMALL -> its folder, saved when first asked for."""
    root, made = tmp_path_factory.mktemp("vaes"), {}

    def give(name):
        if name not in made:
            made[name] = save_small(name, root / name.replace(" ", "_"))
        return str(made[name])

    return give


#################################################################################
#           Latents and pictures, as the pipelines of diffusers have them        #
#################################################################################


def mean_std(z: Tensor) -> Tensor:
    shape = (1, -1, *(1 for _ in z.shape[2:]))
    return (z - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def patchify(z: Tensor) -> Tensor:
    """As Flux2Pipeline._patchify_latents does it."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(b, c * 4, h // 2, w // 2)


def unpatchify(z: Tensor) -> Tensor:
    """As Flux2Pipeline._unpatchify_latents does it."""
    b, c, h, w = z.shape
    z = z.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return z.reshape(b, c // 4, h * 2, w * 2)


def flux_statistics(vae):
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + 1e-4)


def opaque(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


LATENTS = {
    "Asymmetric": lambda vae, x: vae.encode(x).latent_dist.mean * 0.18215,
    "DC": lambda vae, x: vae.encode(x).latent * 0.41407,
    "KL": lambda vae, x: (vae.encode(x).latent_dist.mean - 0.1) * 0.3,
    "KL with lists": lambda vae, x: mean_std(vae.encode(x).latent_dist.mean) * 0.5,
    "Flux2": lambda vae, x: (
        (patchify(vae.encode(x).latent_dist.mean) - flux_statistics(vae)[0]) / flux_statistics(vae)[1]
    ),
    "HunyuanImage": lambda vae, x: vae.encode(x).latent_dist.mean * 0.75,
    "HunyuanImageRefiner": lambda vae, x: vae.encode(x[:, :, None]).latent_dist.mean[:, :, 0] * 1.03682,
    "KVAE": lambda vae, x: vae.encode(x).latent_dist.mean,
    "Qwen": lambda vae, x: mean_std(vae.encode(x[:, :, None]).latent_dist.mean)[:, :, 0],
    "Qwen 2.1": lambda vae, x: mean_std(vae.encode(opaque(x)[:, :, None]).latent_dist.mean)[:, :, 0],
    "TemporalDecoder": lambda vae, x: vae.encode(x).latent_dist.mean * 0.18215,
    "Wan": lambda vae, x: mean_std(vae.encode(x[:, :, None]).latent_dist.mean)[:, :, 0],
    "Wan 2.2": lambda vae, x: mean_std(vae.encode(x[:, :, None]).latent_dist.mean)[:, :, 0],
    "RAE": lambda vae, x: vae.encode(x / 2 + 0.5).latent,
    "Tiny": lambda vae, x: vae.encode(x).latents * 0.5,
    "VQ": lambda vae, x: vae.encode(x).latents * 0.18215,
}
STATISTICS = torch.tensor(STD).view(1, -1, 1, 1), torch.tensor(MEAN).view(1, -1, 1, 1)
PICTURES = {
    "Asymmetric": lambda vae, z: vae.decode(z / 0.18215).sample,
    "DC": lambda vae, z: vae.decode(z / 0.41407).sample,
    "KL": lambda vae, z: vae.decode(z / 0.3 + 0.1).sample,
    "KL with lists": lambda vae, z: vae.decode(z * STATISTICS[0] / 0.5 + STATISTICS[1]).sample,
    "Flux2": lambda vae, z: vae.decode(unpatchify(z * flux_statistics(vae)[1] + flux_statistics(vae)[0])).sample,
    "HunyuanImage": lambda vae, z: vae.decode(z / 0.75).sample,
    "HunyuanImageRefiner": lambda vae, z: vae.decode((z / 1.03682)[:, :, None]).sample[:, :, 0],
    "KVAE": lambda vae, z: vae.decode(z).sample,
    "Qwen": lambda vae, z: vae.decode((z * STATISTICS[0] + STATISTICS[1])[:, :, None]).sample[:, :, 0],
    "Qwen 2.1": lambda vae, z: vae.decode((z * STATISTICS[0] + STATISTICS[1])[:, :, None]).sample[:, :3, 0],
    "TemporalDecoder": lambda vae, z: vae.decode(z / 0.18215, num_frames=1).sample,
    "Wan": lambda vae, z: vae.decode((z * STATISTICS[0] + STATISTICS[1])[:, :, None]).sample[:, :, 0],
    "Wan 2.2": lambda vae, z: vae.decode((z * STATISTICS[0] + STATISTICS[1])[:, :, None]).sample[:, :, 0],
    "RAE": lambda vae, z: vae.decode(z).sample * 2 - 1,
    "Tiny": lambda vae, z: vae.decode(z / 0.5).sample,
    "VQ": lambda vae, z: vae.decode(z / 0.18215).sample,
}


def test_every_class_that_is_taken_has_a_small_model_here():
    assert {kind for kind, _, _ in SMALL.values()} == set(RULES)
    assert set(SMALL) == set(LATENTS) == set(PICTURES)
    assert not set(RULES) & set(REFUSED)


@pytest.mark.parametrize("name", SMALL)
def test_latents_and_pictures_are_those_of_the_pipelines(folder, name):
    kind, _, (channels, factor, side) = SMALL[name]
    codec, vae = load_autoencoder(folder(name), CPU), small_vae(name)
    assert type(codec.vae).__name__ == kind
    assert (codec.channels, codec.factor, codec.side) == (channels, factor, side)
    assert {weight.dtype for weight in codec.parameters()} == {torch.float32}
    height, width = (side, side) if side else (4 * factor, 6 * factor)
    pixels, latents = noise(2, 3, height, width), noise(2, channels, height // factor, width // factor)
    with torch.inference_mode():
        encoded, decoded = LATENTS[name](vae, pixels), PICTURES[name](vae, latents)
    assert encoded.shape == latents.shape and decoded.shape == pixels.shape
    assert encoded.std() > 1e-4 and decoded.std() > 1e-3
    made, drawn = codec.encode(pixels), codec.decode(latents)
    torch.testing.assert_close(made, encoded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn, decoded, rtol=1e-4, atol=1e-5)
    assert torch.equal(made, codec.encode(pixels)) and torch.equal(drawn, codec.decode(latents)), "a map of pictures"


@pytest.mark.parametrize("name", SMALL)
def test_in_bf16_the_first_layer_sees_the_picture_in_float32(folder, name):
    codec, (_, factor, side) = load_autoencoder(folder(name), CPU), SMALL[name][2]
    called = []
    for layer in codec.vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            layer.register_forward_hook(lambda *call: called.append(call))
    pixels = noise(1, 3, side or 8 * factor, side or 8 * factor)
    exact = codec.encode(pixels)
    (layer, (x, *_), in_float32), *_ = called
    called.clear()
    codec.bf16_encode = True
    rough = codec.encode(pixels)
    assert called[0][0] is layer
    assert torch.equal(called[0][1][0], x) and x.dtype == torch.float32
    assert torch.equal(called[0][2], in_float32.bfloat16())
    assert 0 < (rough - exact).std() < 0.05 * exact.std()


def test_packing_is_undone_by_decoding_and_one_packed_channel_is_one_place_of_a_block(folder):
    codec = load_autoencoder(folder("Flux2"), CPU)
    seen = {}
    real = codec.vae.decode
    codec.vae.decode = lambda z: seen.update(z=z) or real(z)
    pixels = noise(1, 3, 32, 48)
    codec.decode(codec.encode(pixels))
    with torch.inference_mode():
        torch.testing.assert_close(seen["z"], codec.vae.encode(pixels).latent_dist.mean, rtol=1e-4, atol=1e-5)
    assert codec.encode(pixels).shape == (1, 12, 4, 6)


def test_the_digest_of_before_is_that_of_scale_and_shift_and_lists_are_in_it(folder):
    codec = load_autoencoder(folder("KL"), CPU)
    assert codec.digest == weights_digest(small_vae("KL").state_dict(), "AutoencoderKL", 0.3, 0.1)
    assert load_autoencoder(folder("KL with lists"), CPU).digest not in (
        codec.digest,
        weights_digest(small_vae("KL with lists").state_dict(), "AutoencoderKL", 0.5, 0.0),
    )


@pytest.mark.parametrize("missing", ["latents_mean", "latents_std"])
def test_one_list_alone_is_no_rule(folder, tmp_path, missing):
    """As in diffusers' pipelines: then the scale alone counts."""
    import diffusers

    kind, arguments, _ = SMALL["KL with lists"]
    torch.manual_seed(0)
    getattr(diffusers, kind)(**arguments | {missing: None}).save_pretrained(tmp_path / "vae")
    codec, vae = load_autoencoder(str(tmp_path / "vae"), CPU), small_vae("KL with lists")
    pixels = noise(1, 3, 16, 16)
    with torch.inference_mode():
        expected = vae.encode(pixels).latent_dist.mean * 0.5
    torch.testing.assert_close(codec.encode(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 40), (64, 64), (8, 8)])
def test_an_autoencoder_of_one_size_refuses_the_others_in_one_line(folder, size):
    codec = load_autoencoder(folder("RAE"), CPU)
    with pytest.raises(UserError, match=rf"takes pictures of 32 x 32 pixels alone, not {size[1]} x {size[0]}$"):
        codec.encode(noise(1, 3, *size))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Wan", {"latents_mean": None}, "latents_mean in its config.json is null; write a list of 4 numbers there"),
        ("Qwen", {"latents_std": [1, 2, 3]}, r"latents_std .* is \[1, 2, 3\]; write a list of 4 numbers above 0"),
        ("Qwen", {"latents_std": [1, 2, 3, 0]}, "write a list of 4 numbers above 0"),
        ("Wan", {"latents_mean": [1, 2, 3, "x"]}, "write a list of 4 numbers there"),
        ("Wan", {"latents_mean": [1, 2, 3, True]}, "write a list of 4 numbers there"),
        ("KL with lists", {"latents_std": [1.0]}, "latents_std .* write a list of 4 numbers above 0"),
        ("HunyuanImage", {"scaling_factor": None}, "scaling_factor in its config.json is null; write a number there"),
    ],
)
def test_a_rule_whose_numbers_are_not_there_is_named(tmp_path, name, change, message):
    save_small(name, tmp_path / "odd")

    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as caught:
        load_autoencoder(str(tmp_path / "odd"), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Wan", {"in_channels": 4, "out_channels": 4}, "in_channels is 4, but pictures have 3 channels"),
        (
            "Wan 2.2",
            {"patch_size": None},
            "in_channels is 12, but pictures have 3 channels",
        ),
        (
            "Qwen 2.1",
            {"in_channels": 3, "out_channels": 3},
            "in_channels is 3, but pictures have 4 channels with their opacity",
        ),
        ("Qwen", {"input_channels": 4}, "input_channels is 4, but pictures have 3 channels"),
        ("RAE", {"num_channels": 4}, "num_channels is 4, but pictures have 3 channels"),
    ],
)
def test_pictures_of_other_channels_are_refused_before_any_is_encoded(tmp_path, name, change, message):
    import diffusers

    kind, arguments, _ = SMALL[name]
    getattr(diffusers, kind)(**arguments | change).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=message):
        load_autoencoder(str(tmp_path / "odd"), CPU)


def test_sizes_that_do_not_come_back_are_refused_at_loading(tmp_path):
    import diffusers

    kind, arguments, _ = SMALL["Asymmetric"]
    deeper = {"up_block_types": ("UpDecoderBlock2D",) * 3, "up_block_out_channels": (16, 16, 16)}
    getattr(diffusers, kind)(**arguments | deeper).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match="encoder and decoder do not fit") as caught:
        load_autoencoder(str(tmp_path / "odd"), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("levels", "factor"), [(6, 32), (7, 64)])
def test_the_factor_of_deep_models_is_found_by_larger_pictures(tmp_path, levels, factor):
    import diffusers

    sizes = {"block_out_channels": (4,) * levels, "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 2}
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": False,
    }
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "deep")
    assert load_autoencoder(str(tmp_path / "deep"), CPU).factor == factor


#################################################################################
#                        From pictures to pictures and back                     #
#################################################################################


def pixels_of(path) -> Tensor:
    return (torch.tensor(np.array(Image.open(path))) / 127.5 - 1).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["DC", "Flux2", "Qwen", "Wan", "RAE", "fp16"])
def test_pictures_are_encoded_trained_on_transferred_certified_and_restored(tmp_path, name):
    draw_styles(tmp_path / "raw_data", 12)
    kind, vae = (name, small_vae(name)) if name in SMALL else ("KL", small_vae("KL").half())
    vae.save_pretrained(tmp_path / "vae", variant="fp16" if name == "fp16" else None)
    vae = vae.float()
    data = {"image_size": 32, "val_fraction": 0.0}  # validation trains a classifier
    training = TINY["training"] | {"stage1_epochs": 1}
    config = TINY | {"autoencoder": {"name": "vae"}, "data": data, "training": training}
    (tmp_path / "config.json").write_text(json.dumps(config))

    status, out, err = call_within(tmp_path, "preprocess_latents", "--device", "cpu")
    assert status == 0 and "latents: 24 encoded, 0 kept, 0 removed" in out, err
    spec = read_meta(tmp_path / "latents").latents
    assert (spec.channels, spec.factor) == SMALL[kind][2][:2]
    picture = pixels_of(tmp_path / "raw_data/cold/000.png")
    with torch.inference_mode():
        expected = LATENTS[kind](vae, picture)
        rebuilt = PICTURES[kind](vae, expected)
    stored = torch.load(tmp_path / "latents/cold/000.png.pt", weights_only=True)["latent"]
    torch.testing.assert_close(stored[None], expected, rtol=1e-4, atol=1e-5)

    assert call_within(tmp_path, "train")[0] == 0
    run = ("--checkpoint", "checkpoints/stage1_epoch1.pt", "--device", "cpu")
    styles = ("--source_style", "cold", "--target_style", "warm", "--certify", "--save_structure", "s.safetensors")
    files = ("--input", "raw_data/cold/000.png", "--output", "out.png")
    status, out, err = call_within(tmp_path, "inference", *run, *styles, *files)
    assert status == 0 and "0 of" in out + err, out + err
    assert Image.open(tmp_path / "out.png").size == (32, 32)
    status, out, err = call_within(tmp_path, "inference", *run, "--restore", "s.safetensors", "--output", "back.png")
    assert status == 0, out + err
    # 8 bits, and what standardising and the lattice of 2^-20 round
    torch.testing.assert_close(pixels_of(tmp_path / "back.png"), rebuilt.clamp(-1, 1), rtol=0, atol=1.1 / 127.5)


def test_a_size_that_an_autoencoder_does_not_take_is_refused_before_any_picture_is_read(tmp_path):
    draw_styles(tmp_path / "raw_data", 1)
    save_small("RAE", tmp_path / "vae")
    (tmp_path / "config.json").write_text(
        json.dumps(TINY | {"autoencoder": {"name": "vae"}, "data": {"image_size": 64}})
    )
    refused(
        call_within(tmp_path, "preprocess_latents", "--device", "cpu"),
        "--target_size 64: the autoencoder vae takes pictures of 32 px alone",
    )
    assert not (tmp_path / "latents").exists()


def test_a_picture_of_another_size_is_refused_by_its_name_and_one_that_is_padded_to_it_is_not(folder):
    codec = load_autoencoder(folder("RAE"), CPU)
    spec = LatentSpec("RAE", 64, 8, 32, ["a"])
    pipeline = Pipeline(SimpleNamespace(size=None), codec, spec, CPU, bf16=False)
    pipeline.check_size(Path("a.png"), (31, 32))
    with pytest.raises(
        UserError, match=r"^b\.png: is 33 x 32 pixels, .*autoencoder takes 32 x 32 alone; .* --size 32$"
    ):
        pipeline.check_size(Path("b.png"), (33, 32))


#################################################################################
#                               Tiles and their seams                           #
#################################################################################


def without_a_view_of_the_whole(vae):
    """The model with norms over the picture and attention as identities: all that is left looks a few cells around."""
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm) or "Attention" in type(module).__name__:
            module.forward = lambda x, *_, **__: x
    return vae


@pytest.mark.parametrize(
    ("name", "tile"),
    [("DC", 384), ("KL with lists", 384), ("Flux2", 384), ("HunyuanImage", 384), ("Qwen 2.1", 384), ("Wan 2.2", 640)],
)
def test_what_looks_only_around_itself_does_not_notice_the_tiles(folder, name, tile):
    codec = load_autoencoder(folder(name), CPU)
    without_a_view_of_the_whole(codec.vae)
    spec = LatentSpec(name, codec.channels, codec.factor, 256, ["a"], [0.0] * codec.channels, [1.0] * codec.channels)
    pipeline = Pipeline(torch.nn.Identity(), codec, spec, CPU, bf16=False, tile=tile)
    sides = []
    for part, cell in (("encode", 1), ("decode", codec.factor)):
        plain = getattr(codec, part)
        setattr(codec, part, lambda x, plain=plain, cell=cell: sides.append(max(x.shape[2:]) * cell) or plain(x))
    picture = noise(1, 3, tile + 125, 64)
    latents = pipeline.encode(picture)
    rebuilt = pipeline.decode(latents, tile + 125, 64)
    assert len(sides) == 4 and max(sides) <= tile
    pipeline.tile = None
    torch.testing.assert_close(latents, pipeline.encode(picture), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rebuilt, pipeline.decode(latents, tile + 125, 64), rtol=1e-3, atol=1e-4)
    assert rebuilt.shape == picture.shape and rebuilt.std() > 1e-4


#################################################################################
#                        The table of docs/autoencoders.md                      #
#################################################################################

FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
UP = {"up_block_types": ("UpDecoderBlock2D",) * 4}
PUBLISHED = {  # arguments of known weights, where the class's defaults are not those
    "AsymmetricAutoencoderKL": {
        "down_block_types": FOUR["down_block_types"],
        "down_block_out_channels": (128, 256, 512, 512),
        "layers_per_down_block": 2,
        "up_block_out_channels": (192, 384, 768, 768),
        "layers_per_up_block": 3,
        **UP,
    },
    "AutoencoderKL": FOUR | UP,
    "AutoencoderKLHunyuanImage": {  # those of scripts/convert_hunyuan_image_to_diffusers.py
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
        "scaling_factor": 0.75289,
    },
    "AutoencoderKLTemporalDecoder": FOUR | {"latent_channels": 4},
    "VQModel": {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 2,
        "num_vq_embeddings": 8192,
        "scaling_factor": 0.18215,
    },
}


@functools.cache
def table_row(kind: str) -> list[str]:
    """The cells that the class itself decides, of a 256-px picture: no number is computed, only shapes."""
    import diffusers

    rule = RULES[kind]
    # Each fails on the other: numbers drawn while it is built, and a tensor made on the CPU while it runs.
    with torch.device("meta") if kind == "AutoencoderRAE" else FakeTensorMode():
        vae = getattr(diffusers, kind)(**PUBLISHED.get(kind, {})).eval()
        x = torch.empty(1, 3 + rule.alpha, 256, 256)
        x = x[:, :, None] if rule.time else x
        encoded = getattr(vae.encode(x), rule.output)
        z = encoded.mode() if rule.output == "latent_dist" else encoded
        assert vae.decode(z, **rule.decode).sample.shape == x.shape
    if hasattr(vae, "bn"):
        vae.bn = torch.nn.BatchNorm2d(vae.bn.num_features, vae.bn.eps)
    z = torch.nn.functional.pixel_unshuffle(z.squeeze(2) if rule.time else z, rule.pack)
    kinds = (
        ["one frame"] * rule.time + ["opacity"] * rule.alpha + [f"packed {rule.pack} x {rule.pack}"] * (rule.pack > 1)
    )
    output = f".{rule.output}" + (".mode()" if rule.output == "latent_dist" else "")
    return [
        f"`{kind}`",
        " x ".join(map(str, z.shape[1:])),
        "[0, 1]" if rule.unit else "[-1, 1]",
        ", ".join([f"`{output}`", *kinds]),
        f"`{rule.affine('the table', vae).text}`",
    ]


def rows_of(page: str, number: int) -> list[list[str]]:
    """The cells of the page's table of this number."""
    tables = [block for block in (ROOT / page).read_text(encoding="utf-8").split("\n\n") if "| ---" in block]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in tables[number].splitlines()[2:]]


@pytest.mark.parametrize("page", ["docs/autoencoders.md", "docs/autoencoders_zh.md"])
def test_the_page_has_a_row_a_class_with_what_diffusers_does_now(page):
    with torch.inference_mode():
        expected = [table_row(kind) for kind in RULES]
    assert [row[:5] for row in rows_of(page, 1)] == expected, "\n" + "\n".join(
        f"| {' | '.join(row)} |" for row in expected
    )


@pytest.mark.parametrize("page", ["docs/autoencoders.md", "docs/autoencoders_zh.md"])
def test_the_page_names_every_other_class_with_why_it_is_refused(page):
    rows = rows_of(page, -1)
    assert [row[0] for row in rows] == [f"`{kind}`" for kind in REFUSED]
    assert page.endswith("_zh.md") or [row[1] for row in rows] == list(REFUSED.values())


def test_no_autoencoder_of_diffusers_is_forgotten():
    import diffusers.models.autoencoders as theirs

    kinds = {name for name, kind in vars(theirs).items() if hasattr(kind, "encode") and hasattr(kind, "decode")}
    assert kinds == set(RULES) | set(REFUSED)
