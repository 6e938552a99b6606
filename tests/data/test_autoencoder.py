"""The codecs: the block DCT against scipy, and the diffusers VAEs against diffusers itself."""

import errno
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import ROOT
from isonext.data import autoencoder
from isonext.data.autoencoder import DiffusersAutoencoder, load_autoencoder, tiled, weights_digest
from isonext.data.demo_pictures import draw_scene
from isonext.data.images import to_bytes, to_pixels
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.evaluation.metrics import psnr
from isonext.pipeline import Pipeline

CPU = torch.device("cpu")
WEIGHTS = ROOT.parent / "shared" / "weights"


def noise(*shape, seed=0):
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(side):
    """(1, 3, side, side): a few slow waves a colour, with random phases, within [-1, 1]."""
    generator = torch.Generator().manual_seed(4)
    position = torch.arange(side) / side
    picture = torch.zeros(3, side, side)
    for u in range(4):
        for v in range(4):
            phase = torch.rand(3, 1, 1, generator=generator)
            picture += torch.cos(2 * torch.pi * (u * position[:, None] + v * position + phase)) / (1 + u + v) ** 2
    return (0.9 * picture / picture.abs().max())[None]


#################################################################################
#                                 The block DCT                                 #
#################################################################################


@settings(deadline=None, max_examples=30)
@given(f=st.sampled_from([1, 2, 3, 4, 8]), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_dct_loses_nothing_at_three_f_squared_channels(f, rows, columns, seed):
    codec = load_autoencoder(f"dct:f{f}c{3 * f * f}", CPU)
    pixels = noise(2, 3, f * rows, f * columns, seed=seed)
    # Both ways sum 3 f^2 numbers of size up to f in float32: 2^-24 relative each, were all roundings to add up.
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), pixels, rtol=0, atol=2 * 3 * f * f * f * 2.0**-24)


def test_the_dct_channels_are_scipys_orthonormal_dct_of_y_cb_and_cr():
    codec = load_autoencoder("dct:f4c48", CPU)
    pixels = noise(1, 3, 8, 12)
    red, green, blue = pixels[0].double().numpy()
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [y, (blue - y) / (2 * (1 - 0.114)), (red - y) / (2 * (1 - 0.299))]
    blocks = np.stack([p.reshape(2, 4, 3, 4).transpose(0, 2, 1, 3) for p in planes])  # (3, 2, 3, 4, 4)
    expected = scipy.fft.dctn(blocks, axes=(3, 4), norm="ortho").transpose(0, 3, 4, 1, 2).reshape(48, 2, 3)
    latents = codec.encode(pixels)[0].double().numpy()
    # the matrix of BT.601 is written with six digits, so Cb and Cr of numbers up to 4 are good to 1e-5
    distance = np.abs(latents[:, None] - expected[None]).max((2, 3))  # (48 channels, 48 coefficients)
    assert sorted(distance.argmin(1)) == list(range(48))
    assert distance.min(1).max() < 1e-5
    assert distance.argmin(1)[0] == 0


def test_fewer_dct_channels_are_the_first_of_more():
    pixels = noise(1, 3, 16, 16)
    every = load_autoencoder("dct:f4c48", CPU).encode(pixels)
    for channels in (1, 7, 12):
        kept = load_autoencoder(f"dct:f4c{channels}", CPU).encode(pixels)
        torch.testing.assert_close(kept, every[:, :channels], rtol=0, atol=1e-6)


def test_every_dct_channel_dropped_costs_psnr_on_a_smooth_picture():
    picture = smooth(48)
    quality = []
    for channels in (1, 2, 3, 6, 12, 24, 48):
        codec = load_autoencoder(f"dct:f4c{channels}", CPU)
        quality.append(psnr(codec.decode(codec.encode(picture)), picture).item())
    assert quality == sorted(set(quality))
    assert quality[4] > 30
    assert quality[-1] > 100


@pytest.mark.parametrize("f", [1, 2, 4, 8])
@pytest.mark.parametrize(("colour", "luma"), [((0.5, 0.5, 0.5), 0.5), ((1.0, 0.0, -1.0), 0.185), ((-1, -1, -1), -1.0)])
def test_dct_channel_zero_of_a_constant_picture_is_its_luma_times_f(f, colour, luma):
    pixels = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 2 * f, 3 * f)
    latents = load_autoencoder(f"dct:f{f}c3", CPU).encode(pixels)
    torch.testing.assert_close(latents[0, 0], torch.full((2, 3), f * luma), rtol=0, atol=f * 1e-6)


def test_a_grey_constant_picture_is_nothing_but_channel_zero():
    latents = load_autoencoder("dct:f4c48", CPU).encode(torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(latents[:, 0], torch.full((1, 2, 2), 2.0), rtol=0, atol=1e-6)
    assert latents[:, 1:].abs().max() < 1e-6


def test_plain_dct_is_the_f4_codec_with_12_channels():
    codec, spelled = load_autoencoder("dct", CPU), load_autoencoder("dct:f4c12", CPU)
    assert (codec.name, codec.factor, codec.channels) == ("dct:f4c12", 4, 12)
    assert torch.equal(codec.analysis, spelled.analysis)


@pytest.mark.parametrize(
    ("name", "help_text"),
    [
        ("dct:", "written dct or dct:f4c12"),
        ("dct:f4", "written dct or dct:f4c12"),
        ("dct:c12f4", "written dct or dct:f4c12"),
        ("dct:f4c-1", "written dct or dct:f4c12"),
        ("dct:f4c49", "c 1 to 3 f^2 = 48"),
        ("dct:f4c0", "c 1 to 3 f^2 = 48"),
        ("dct:f0c1", "f must be 1 to 64"),
        ("dct:f65c1", "f must be 1 to 64"),
    ],
)
def test_a_bad_dct_name_is_one_line_that_names_it_and_says_what_is_allowed(name, help_text):
    with pytest.raises(UserError) as caught:
        load_autoencoder(name, CPU)
    assert str(caught.value).startswith(f"autoencoder {name}: ")
    assert help_text in str(caught.value)
    assert "\n" not in str(caught.value)


#################################################################################
#                              VAEs of diffusers                                #
#################################################################################


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look at the hub: read from the environment once, at import, so both are set."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small random VAE of either class, saved as diffusers does."""
    import diffusers

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(root / "AutoencoderKL")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=5,
        scaling_factor=0.5,
    ).save_pretrained(root / "AutoencoderTiny")
    return root


@pytest.mark.parametrize(("kind", "channels", "factor"), [("AutoencoderKL", 3, 4), ("AutoencoderTiny", 5, 2)])
def test_a_folder_is_loaded_by_the_class_in_its_config(folders, kind, channels, factor):
    codec = load_autoencoder(str(folders / kind), CPU)
    assert type(codec.vae).__name__ == kind
    assert (codec.channels, codec.factor) == (channels, factor)
    assert codec.encode(noise(1, 3, 16, 24)).shape == (1, channels, 16 // factor, 24 // factor)
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert not codec.vae.training


def test_kl_encodes_to_the_posterior_mean_shifted_and_scaled(folders):
    import diffusers

    vae, pixels = diffusers.AutoencoderKL.from_pretrained(folders / "AutoencoderKL").eval(), noise(2, 3, 16, 16)
    codec = load_autoencoder(str(folders / "AutoencoderKL"), CPU)
    with torch.inference_mode():
        posterior = vae.encode(pixels).latent_dist
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents, (posterior.mean - 0.1159) * 0.3611)
    assert torch.equal(latents, codec.encode(pixels))
    assert (posterior.sample() - posterior.mean).abs().max() > 1e-3  # so a sample would have been told apart


def test_tiny_encodes_to_its_latents_scaled(folders):
    import diffusers

    vae, pixels = diffusers.AutoencoderTiny.from_pretrained(folders / "AutoencoderTiny").eval(), noise(2, 3, 16, 16)
    with torch.inference_mode():
        expected = vae.encode(pixels).latents * 0.5
    torch.testing.assert_close(load_autoencoder(str(folders / "AutoencoderTiny"), CPU).encode(pixels), expected)


@pytest.mark.parametrize(
    ("kind", "channels", "shift", "scale"), [("AutoencoderKL", 3, 0.1159, 0.3611), ("AutoencoderTiny", 5, 0.0, 0.5)]
)
def test_decoding_takes_scale_and_shift_off_again(folders, kind, channels, shift, scale):
    import diffusers

    raw = noise(1, channels, 4, 4)
    with torch.inference_mode():
        expected = getattr(diffusers, kind).from_pretrained(folders / kind).eval().decode(raw).sample
    made = load_autoencoder(str(folders / kind), CPU).decode((raw - shift) * scale)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_digest_is_of_the_weights_and_the_scale_wherever_they_lie(folders, tmp_path, kind):
    digest = load_autoencoder(str(folders / kind), CPU).digest
    moved = copy_of(folders / kind, tmp_path / "moved")
    assert load_autoencoder(str(moved), CPU).digest == digest
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0, "_diffusers_version": "9.9"}))
    scaled = load_autoencoder(str(moved), CPU).digest
    (moved / "config.json").write_text(json.dumps(config))
    weights = load_file(moved / "diffusion_pytorch_model.safetensors")
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, moved / "diffusion_pytorch_model.safetensors")
    changed = load_autoencoder(str(moved), CPU).digest
    assert len({digest, scaled, changed}) == 3 and len(digest) == 64


def test_the_digest_of_a_dct_is_that_of_its_sizes():
    assert load_autoencoder("dct", CPU).digest == load_autoencoder("dct:f4c12", CPU).digest
    assert load_autoencoder("dct", CPU).digest != load_autoencoder("dct:f4c13", CPU).digest


def test_the_digest_takes_in_names_types_shapes_and_bytes():
    x = torch.arange(6.0)
    same = {"a": x, "b": x[:0]}
    others = [
        {"c": x, "b": x[:0]},
        {"a": x.view(2, 3), "b": x[:0]},
        {"a": x + 1, "b": x[:0]},
        {"a": x.half(), "b": x[:0]},
    ]
    assert weights_digest(same) == weights_digest({"b": x[:0], "a": x.view(2, 3).T.contiguous().T.reshape(6)})
    assert len({weights_digest(weights) for weights in (same, *others)} | {weights_digest(same, 2.0)}) == 6


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def without_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def with_half_the_weights_file(folder):
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def with_a_broken_config(folder):
    (folder / "config.json").write_text("{")


def with_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 7}))


def copy_of(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    "breakage",
    [empty, without_weights, with_half_the_weights_file, with_a_broken_config, with_weights_of_another_shape],
)
def test_a_broken_folder_is_one_line_that_names_it_and_both_ways_out(folders, tmp_path, breakage):
    folder = copy_of(folders / "AutoencoderKL", tmp_path / "broken")
    breakage(folder)
    with pytest.raises(UserError, match="does not load") as caught:
        load_autoencoder(str(folder), CPU)
    message = str(caught.value)
    assert message.startswith(f"autoencoder {folder}: ")
    assert "local diffusers folder" in message
    assert "built-in codec: dct" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["no/such-vae", "no-such-vae", "./no/such/folder", "dctx"])
def test_a_name_that_is_nowhere_is_one_line_with_both_ways_out(name):
    with pytest.raises(UserError) as caught:
        load_autoencoder(name, CPU)
    message = str(caught.value)
    assert message.startswith(f"autoencoder {name}: no such local folder")
    assert "local diffusers folder" in message
    assert "built-in codec: dct" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("UNet2DConditionModel", r"no autoencoder of pictures that is known here: docs/autoencoders\.md lists those"),
        (None, "no autoencoder of pictures that is known here"),
        ("AutoencoderOobleck", "an autoencoder of sound"),
        ("AutoencoderKLMochi", "an autoencoder of videos"),
        ("ConsistencyDecoderVAE", "its decoder draws noise"),
    ],
)
def test_a_class_that_is_not_taken_is_named_and_told_why(folders, tmp_path, kind, reason):
    folder = copy_of(folders / "AutoencoderKL", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": kind}))
    with pytest.raises(UserError, match=rf"its class is {kind}, {reason}") as caught:
        load_autoencoder(str(folder), CPU)
    assert "\n" not in str(caught.value)


def hub_error(kind, message="an error of the hub"):
    """As huggingface_hub raises it."""
    return kind(message, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (lambda: hub_error(errors.GatedRepoError), "is gated on the hub: accept its terms there, and log in"),
        (
            lambda: hub_error(errors.RepositoryNotFoundError),
            "no such local folder, and the hub has none, or",
        ),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "does not load .*No space left on device"),
        (lambda: errors.LocalEntryNotFoundError("offline"), "no such local folder, not in the cache, and the hub"),
        (lambda: RuntimeError("Data processing error: os error 28"), "does not load .*os error 28"),
    ],
)
def test_what_the_hub_really_said_is_told(monkeypatch, cause, reason):
    import diffusers

    def download(*_, **__):
        raise cause()

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", download)
    with pytest.raises(UserError, match=rf"^autoencoder some/vae: {reason}.*built-in codec: dct$") as caught:
        load_autoencoder("some/vae", CPU)
    assert "\n" not in str(caught.value)


def test_a_cached_repository_of_another_class_is_named(folders, monkeypatch):
    import diffusers

    monkeypatch.setattr(
        diffusers.configuration_utils, "hf_hub_download", lambda *_, **__: str(folders / "Oobleck.json")
    )
    (folders / "Oobleck.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(UserError, match=r"some/vae: does not load .*its class is AutoencoderOobleck, an autoencoder"):
        load_autoencoder("some/vae", CPU)


TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("in_channels", 1, "in_channels is 1, but pictures have 3 channels"),
        ("in_channels", 4, "in_channels is 4, but pictures have 3 channels"),
        ("out_channels", 4, "out_channels is 4, but pictures have 3 channels"),
        ("scaling_factor", None, r"scaling_factor in its config\.json is null; write a number"),
        ("scaling_factor", "0.18", r"scaling_factor in its config\.json is \"0\.18\"; write a number"),
        ("scaling_factor", True, r"scaling_factor in its config\.json is true; write a number"),
        ("scaling_factor", 0, r"scaling_factor in its config\.json is 0; write another number"),
    ],
)
def test_what_is_no_autoencoder_of_rgb_or_has_no_scale_is_named(tmp_path, kind, key, value, message):
    import diffusers

    sizes = {"AutoencoderKL": {"block_out_channels": (8,), "norm_num_groups": 4}, "AutoencoderTiny": TINY}[kind]
    folder = tmp_path / "odd"
    channels = {key: value} if key.endswith("channels") else {}
    getattr(diffusers, kind)(**sizes, **channels).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=rf"^autoencoder {folder}: {message}"):
        load_autoencoder(str(folder), CPU)


@pytest.mark.parametrize("deeper", ["encoder", "decoder"])
def test_a_tiny_autoencoder_whose_halves_do_not_fit_is_refused_at_once(tmp_path, deeper):
    import diffusers

    changes = {f"{deeper}_block_out_channels": (8, 8, 8), f"num_{deeper}_blocks": (1, 1, 1)}
    diffusers.AutoencoderTiny(**TINY | changes).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"odd: makes latents of shape .*: encoder and decoder do not fit"):
        load_autoencoder(str(tmp_path / "odd"), CPU)


def test_an_autoencoder_whose_weights_are_no_numbers_is_refused_at_once(folders, tmp_path):
    folder = copy_of(folders / "AutoencoderTiny", tmp_path / "broken")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["encoder.layers.0.bias"][0] = torch.nan
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="broken: makes no finite numbers of a grey picture"):
        load_autoencoder(str(folder), CPU)


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taesd3", 16)])
def test_a_pretrained_tiny_autoencoder_rebuilds_a_smooth_picture(name, channels):
    if not (WEIGHTS / name).is_dir():
        pytest.skip(f"../shared/weights/{name} is not there")
    codec, picture = load_autoencoder(str(WEIGHTS / name), CPU), smooth(96)
    latents = codec.encode(picture)
    assert (codec.channels, codec.factor) == (channels, 8)
    assert latents.shape == (1, channels, 12, 12)
    assert psnr(codec.decode(latents), picture).item() > 20


@pytest.mark.parametrize(
    ("device", "has", "encode", "decode"),
    [("cpu", True, True, True), ("cpu", False, False, False), ("mps", True, False, False), ("cuda", True, True, True)],
)
def test_it_computes_in_bf16_on_a_card_and_on_a_cpu_that_has_it(folders, monkeypatch, device, has, encode, decode):
    monkeypatch.setattr(autoencoder, "has_bf16", lambda device: has)
    monkeypatch.setattr(DiffusersAutoencoder, "_probe", lambda codec: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    codec = load_autoencoder(str(folders / "AutoencoderKL"), torch.device(device))
    assert (codec.bf16_encode, codec.bf16_decode) == (encode, decode)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_in_bf16_latents_and_pictures_are_float32_and_near_those_of_float32(folders, kind):
    exact, quick = (load_autoencoder(str(folders / kind), CPU) for _ in range(2))
    quick.bf16_encode = quick.bf16_decode = True
    pixels = noise(2, 3, 32, 32)
    latents, rough = exact.encode(pixels), quick.encode(pixels)
    pictures, drawn = exact.decode(latents), quick.decode(latents)
    assert rough.dtype == drawn.dtype == torch.float32
    for rounded, true in ((rough, latents), (drawn, pictures)):
        assert 0 < (rounded - true).std() < 0.05 * true.std()  # 2^-8 a layer


@pytest.mark.parametrize(("part", "cost"), [("bf16_encode", 0.02), ("bf16_decode", 0.1)])
@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_bf16_costs_a_pretrained_autoencoder_less_than_a_tenth_of_a_decibel(name, part, cost):
    """In encoding far less: of this smooth picture, pixels in BF16 would cost taesd3 0.14 dB."""
    if not (WEIGHTS / name).is_dir():
        pytest.skip(f"../shared/weights/{name} is not there")
    codec, picture = load_autoencoder(str(WEIGHTS / name), CPU), to_pixels(to_bytes(draw_scene(5, "shaded", 256)))[None]
    exact = psnr(codec.decode(codec.encode(picture)).clamp(-1, 1), picture).item()
    setattr(codec, part, True)
    assert psnr(codec.decode(codec.encode(picture)).clamp(-1, 1), picture).item() > exact - cost


#################################################################################
#                            A large batch, in parts                            #
#################################################################################


@pytest.fixture
def watched(folders, monkeypatch):
    """An AutoencoderKL of factor 4, and the rows of all that goes through its encoder and decoder; `room` rows fit."""
    codec, seen, room = load_autoencoder(str(folders / "AutoencoderKL"), CPU), [], [99]
    for name, real in (("encode", codec.vae.encode), ("decode", codec.vae.decode)):

        def call(x, real=real):
            seen.append(len(x))
            if len(x) > room[0]:
                raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            return real(x)

        monkeypatch.setattr(codec.vae, name, call)
    return codec, seen, room


@pytest.mark.parametrize(("limit", "parts"), [(2**20, [7]), (7 * 384, [7]), (7 * 384 - 1, [6, 1]), (3 * 384, [3, 3, 1]),
                                              (384, [1] * 7), (1, [1] * 7)])  # fmt: skip
def test_a_batch_goes_through_in_parts_of_so_many_pixels_and_is_what_it_was(watched, limit, parts):
    codec, seen, _ = watched
    pixels = noise(7, 3, 16, 24)
    assert codec.pixels_at_once == 2**20
    whole = codec.encode(pixels)
    drawn = codec.decode(whole)
    codec.pixels_at_once = limit
    seen.clear()
    latents = codec.encode(pixels)
    assert seen == parts
    rebuilt = codec.decode(whole)
    assert seen == parts * 2, "as many of the pixels that come out"
    torch.testing.assert_close(latents, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(rebuilt, drawn, rtol=0, atol=1e-4)
    start = 0
    for rows in parts:
        assert torch.equal(latents[start : start + rows], codec.encode(pixels[start : start + rows]))
        start += rows


def test_where_memory_runs_out_half_as_many_go_through_from_then_on(watched, capsys):
    codec, seen, room = watched
    pixels = noise(7, 3, 16, 24)
    whole, room[0] = codec.encode(pixels), 3
    seen.clear()
    torch.testing.assert_close(codec.encode(pixels), whole, rtol=0, atol=1e-5)
    assert seen == [7, 4, 2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "out of memory in the autoencoder with 7 pictures: going on with 4",
        "out of memory in the autoencoder with 4 pictures: going on with 2",
    ]
    seen.clear()
    codec.decode(whole)
    assert seen == [2, 2, 2, 1]
    seen.clear()
    codec.encode(noise(3, 3, 32, 24))  # pictures twice as large
    assert seen == [1, 1, 1]


def test_where_one_picture_is_too_much_the_error_stands_and_others_are_not_taken_for_it(watched, monkeypatch):
    codec, seen, room = watched
    room[0] = 0
    with pytest.raises(RuntimeError, match="can't allocate"):
        codec.encode(noise(2, 3, 16, 16))
    assert seen == [2, 1]
    monkeypatch.setattr(codec.vae, "encode", lambda x: x.view(7, 7))
    with pytest.raises(RuntimeError, match="shape"):
        codec.encode(noise(2, 3, 16, 16))


#################################################################################
#                                Pictures in tiles                              #
#################################################################################


def rounding(tile, overlap):
    """What float32 may lose: n tiles lie on a cell, and a weighted mean of n numbers up to 1 has 2 n sums and more."""
    tiles = (math.ceil(tile / (tile - overlap)) + 1) ** 2
    return (tiles + 3) * 2.0**-23


@st.composite
def cuttings(draw):
    """(height, width, tile, overlap) in cells: more than two tiles, exactly one, or less."""
    tile = draw(st.integers(1, 12))
    return draw(st.integers(1, 40)), draw(st.integers(1, 40)), tile, draw(st.integers(0, tile - 1))


@settings(deadline=None, max_examples=150)
@given(cutting=cuttings(), seed=st.integers(0, 1000))
def test_tiles_of_which_nothing_is_made_are_the_picture_again(cutting, seed):
    height, width, tile, overlap = cutting
    x = noise(2, 3, height, width, seed=seed)
    same = tiled(lambda part: part, x, tile, overlap, Fraction(1))
    torch.testing.assert_close(same, x, rtol=0, atol=rounding(tile, overlap))


@settings(deadline=None, max_examples=60)
@given(cutting=cuttings(), factor=st.sampled_from([2, 3, 8]))
def test_average_pooling_and_its_repetition_do_not_notice_the_tiles(cutting, factor):
    """What makes each cell from itself alone: an autoencoder without a view around, in both directions."""
    height, width, tile, overlap = cutting

    def shrink(x):
        return F.avg_pool2d(x, factor)

    def enlarge(x):
        return F.interpolate(x, scale_factor=factor)

    pixels = noise(1, 2, height * factor, width * factor)
    small = tiled(shrink, pixels, tile * factor, overlap * factor, Fraction(1, factor))
    torch.testing.assert_close(small, shrink(pixels), rtol=0, atol=rounding(tile, overlap))
    cells = noise(1, 2, height, width)
    large = tiled(enlarge, cells, tile, overlap, Fraction(factor))
    torch.testing.assert_close(large, enlarge(cells), rtol=0, atol=rounding(tile, overlap))


@settings(deadline=None, max_examples=60)
@given(cutting=cuttings())
def test_no_tile_is_larger_than_asked_and_together_they_see_every_cell(cutting):
    height, width, tile, overlap = cutting
    x, seen = torch.arange(float(height * width)).view(1, 1, height, width), []

    def look(part):
        seen.append(part)
        return part

    tiled(look, x, tile, overlap, Fraction(1))
    assert {part.shape[-2:] for part in seen} == {(min(height, tile), min(width, tile))}
    assert set(torch.cat([part.flatten() for part in seen]).int().tolist()) == set(range(height * width))


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (1, 3)])
def test_a_picture_no_larger_than_a_tile_is_worked_on_once_and_whole(size):
    x, kernel, seen = noise(1, 3, *size), noise(3, 3, 3, 3), []

    def blur(part):
        seen.append(part)
        return F.conv2d(part, kernel, padding=1)

    assert torch.equal(tiled(blur, x, 8, 4, Fraction(1)), F.conv2d(x, kernel, padding=1))
    assert len(seen) == 1 and torch.equal(seen[0], x)


def seen_from(radius):
    """A mean over all cells up to `radius` away, which takes zeros for what lies outside of its tile."""
    kernel = noise(1, 1, 2 * radius + 1, 2 * radius + 1, seed=1) / (2 * radius + 1)
    return lambda part: F.conv2d(part, kernel, padding=radius)


@pytest.mark.parametrize("radius", [1, 3])
def test_what_does_not_look_beyond_three_eighths_of_the_overlap_does_not_notice_the_tiles(radius):
    x, blur = noise(1, 1, 44, 30), seen_from(radius)
    torch.testing.assert_close(tiled(blur, x, 16, 8, Fraction(1)), blur(x), rtol=0, atol=1e-5)
    assert (tiled(blur, x, 16, 0, Fraction(1)) - blur(x)).abs().max() > 0.1, "without an overlap it would"


def test_what_looks_one_cell_further_is_off_only_at_the_seams_and_by_far_less_than_without_blending():
    height, width, blur = 44, 30, seen_from(4)
    x = noise(1, 1, height, width)
    blended, cut = (tiled(blur, x, 16, overlap, Fraction(1)) - blur(x) for overlap in (8, 0))
    # By hand: tiles start at 0, 8, 16, 24 and 28 of 44 rows, and at 0, 8 and 14 of 30 columns. Their three outermost
    # rows and columns count nothing; the fourth does, and what it is made from includes what is not there.
    rows = {11, 19, 27, 31, 12, 20, 28, 36}
    columns = {11, 17, 12, 20}
    at_seam = torch.tensor([[y in rows or x in columns for x in range(width)] for y in range(height)])
    assert (blended[0, 0][~at_seam].abs() < 1e-5).all()
    assert (blended[0, 0][at_seam].abs() > 1e-5).float().mean() > 0.9
    assert blended.abs().max() < 0.5 * cut.abs().max()
    assert 0 < blended.square().mean() < 0.05 * cut.square().mean()


def test_one_tile_goes_over_into_the_next_in_the_middle_of_their_overlap():
    makers = iter([torch.zeros, torch.ones])  # the first tile becomes 0, the second 1
    line = tiled(lambda part: next(makers)(part.shape), torch.zeros(1, 1, 4, 24), 16, 8, Fraction(1))[0, 0]
    expected = torch.tensor([0.0] * 8 + [0, 0, 0, 0.25, 0.75, 1, 1, 1] + [1.0] * 8)
    torch.testing.assert_close(line, expected.expand(4, 24))


def vae_pipeline(name, tile):
    """A pipeline around one of the pretrained autoencoders, its latents left as they are."""
    if not (WEIGHTS / name).is_dir():
        pytest.skip(f"../shared/weights/{name} is not there")
    codec = load_autoencoder(str(WEIGHTS / name), CPU)
    spec = LatentSpec(name, codec.channels, codec.factor, 256, ["a"], [0.0] * codec.channels, [1.0] * codec.channels)
    return Pipeline(torch.nn.Identity(), codec, spec, CPU, bf16=False, tile=tile)


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taesd3", 16)])
@pytest.mark.parametrize("size", [(256, 256), (97, 250)])
def test_a_pretrained_autoencoder_makes_the_same_picture_in_tiles(name, channels, size):
    pipeline = vae_pipeline(name, tile=128)
    sides, codec = [], pipeline.codec
    for part in ("encode", "decode"):
        plain = getattr(codec, part)

        def watched(x, plain=plain, cell=1 if part == "encode" else 8):
            sides.append(max(x.shape[-2:]) * cell)
            return plain(x)

        setattr(codec, part, watched)
    picture = smooth(256)[..., : size[0], : size[1]]
    latents = pipeline.encode(picture)
    rebuilt = pipeline.decode(latents, *size)
    assert max(sides) <= 128 and len(sides) > 2
    sides.clear()
    pipeline.tile = None
    expected = pipeline.encode(picture)
    whole = pipeline.decode(expected, *size)
    assert len(sides) == 2 and max(sides) > 128
    assert latents.shape == expected.shape == (1, channels, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    assert rebuilt.shape == picture.shape
    rebuilt, whole = rebuilt.clamp(-1, 1), whole.clamp(-1, 1)
    cost, own = psnr(rebuilt, whole).item(), psnr(whole, picture).item()
    assert cost > 38 and cost > own + 5  # dB: far less than the autoencoder itself costs
    assert not torch.equal(rebuilt, whole)


def test_tiles_of_the_default_size_are_beyond_what_the_small_autoencoder_sees():
    pipeline, picture = vae_pipeline("taesd", tile=1024), smooth(1400)[..., :64, :]
    latents = pipeline.encode(picture)
    rebuilt = pipeline.decode(latents, 64, 1400)
    pipeline.tile = None
    whole = pipeline.encode(picture)
    assert (latents - whole).abs().max() < 1e-4  # rounding; what a tile's edge does is hundreds of times that
    assert psnr(rebuilt, pipeline.decode(whole, 64, 1400)).item() > 100


def test_tiles_larger_than_the_picture_and_no_tiles_give_the_same_bits():
    picture, made = smooth(96), {}
    for tile in (None, 96, 1024):
        pipeline = vae_pipeline("taesd", tile)
        latents = pipeline.encode(picture)
        made[tile] = (latents, pipeline.decode(latents, 96, 96))
    for other in (96, 1024):
        assert all(torch.equal(a, b) for a, b in zip(made[None], made[other], strict=True))


def test_the_block_codec_is_never_tiled_since_its_blocks_know_nothing_of_each_other():
    codec = load_autoencoder("dct", CPU)
    spec = LatentSpec("dct", 12, 4, 64, ["a"], [0.0] * 12, [1.0] * 12)
    pipeline, picture = Pipeline(torch.nn.Identity(), codec, spec, CPU, bf16=False, tile=64), noise(1, 3, 128, 100)
    assert torch.equal(pipeline.encode(picture), codec.encode(picture))
