"""Every picture autoencoder of diffusers: what the adapter makes of it, against its pipeline's arithmetic."""

import json

import pytest
import torch
from torch import Tensor

from isonext.data.autoencoder import load_autoencoder, weights_digest
from isonext.data.vae_rules import REFUSED, RULES
from isonext.errors import UserError
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
