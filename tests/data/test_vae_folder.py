"""What folders and repositories an autoencoder is found in: pipelines, variants, and the hub's cache of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from isonext.data.autoencoder import load_autoencoder, weights_digest
from isonext.errors import UserError
from small_vaes import save_small, small_vae

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look at the hub: read from the environment once, at import, so both are set."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def pipeline_in(folder, part="vae", **options):
    """A whole pipeline as save_pretrained leaves it, with its text encoder and the like."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    index = {"_class_name": "StableDiffusionPipeline", part: ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    save_small("KL", folder / part, **options)
    return folder


def halved_digest():
    state = {key: value.half().float() for key, value in small_vae("KL").state_dict().items()}
    return weights_digest(state, "AutoencoderKL", 0.3, 0.1)


@pytest.mark.parametrize("part", ["vae", "vqvae", "movq"])
def test_of_a_whole_pipeline_the_autoencoder_is_taken_and_said_so(tmp_path, capsys, part):
    folder = pipeline_in(tmp_path / "sd", part)
    codec = load_autoencoder(str(folder), CPU)
    assert (codec.name, codec.channels, codec.factor) == (str(folder), 4, 4)
    assert capsys.readouterr().err == f"autoencoder {folder}: a whole pipeline, of which its {part} is taken\n"
    assert load_autoencoder(str(folder / part), CPU).digest == codec.digest
    assert capsys.readouterr().err == "", "the part itself is no pipeline"


def test_a_pipeline_without_an_autoencoder_is_one_line(tmp_path):
    folder = pipeline_in(tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="this folder does not load") as caught:
        load_autoencoder(str(folder), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"safe_serialization": False}])
def test_a_folder_of_one_variant_alone_is_loaded_in_float32(tmp_path, variant, options):
    vae = small_vae("KL").half()
    vae.save_pretrained(tmp_path / "vae", variant=variant, **options)
    assert not list((tmp_path / "vae").glob("diffusion_pytorch_model.safetensors"))
    assert len(list((tmp_path / "vae").iterdir())) > 2 or "max_shard_size" not in options
    codec = load_autoencoder(str(tmp_path / "vae"), CPU)
    assert {weight.dtype for weight in codec.parameters()} == {torch.float32}
    assert codec.digest == halved_digest()


def test_of_a_folder_with_both_the_full_weights_are_taken(tmp_path):
    save_small("KL", tmp_path / "vae")
    full = load_autoencoder(str(tmp_path / "vae"), CPU).digest
    small_vae("KL").half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert load_autoencoder(str(tmp_path / "vae"), CPU).digest == full != halved_digest()


def test_a_batch_norms_counter_may_be_missing_and_nothing_else(tmp_path):
    path = save_small("Flux2", tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    digest, weights = load_autoencoder(str(tmp_path / "vae"), CPU).digest, load_file(path)
    weights.pop("bn.num_batches_tracked")
    save_file(weights, path, {"format": "pt"})
    assert load_autoencoder(str(tmp_path / "vae"), CPU).digest == digest
    weights.pop("bn.running_var")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, e\.g\. bn\.running_var"):
        load_autoencoder(str(tmp_path / "vae"), CPU)


def cached(repository, root, monkeypatch):
    """The hub's cache with this folder as the repository some/thing."""
    import huggingface_hub.constants

    cache = root / "cache/models--some--thing"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(repository, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "cache"))


@pytest.mark.parametrize("download", [False, True])
def test_a_cached_repository_of_a_pipeline_and_of_a_variant_alone_are_found(tmp_path, capsys, monkeypatch, download):
    pipeline = pipeline_in(tmp_path / "sd")
    shutil.rmtree(pipeline / "vae")
    small_vae("KL").half().save_pretrained(pipeline / "vae", variant="fp16")
    cached(pipeline, tmp_path, monkeypatch)
    codec = load_autoencoder("some/thing", CPU, download)
    assert codec.digest == halved_digest()
    assert "autoencoder some/thing: a whole pipeline, of which its vae is taken" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["KL", "Flux2", "Wan", "DC", "RAE"])
def test_a_missing_weight_is_not_left_random(tmp_path, name):
    from safetensors.torch import load_file, save_file

    file = save_small(name, tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = sorted(key for key in weights if key.startswith("decoder."))[0]
    del weights[gone]
    save_file(weights, file)
    with pytest.raises(UserError, match=f"1 weights are missing, e.g. {gone}"):
        load_autoencoder(str(tmp_path / "vae"), CPU)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layers_per_block", 10**7, "layers_per_block = 1e+07: more than 1000"),
        ("block_out_channels", [32, 10**9], "block_out_channels = 1e+09: more than 1048576"),
        ("block_out_channels", [], "does not load"),
    ],
)
def test_sizes_that_no_autoencoder_has_are_refused_before_it_is_built(tmp_path, key, value, words):
    folder = save_small("KL", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(folder), CPU)
    assert words in str(caught.value) and "\n" not in str(caught.value)
