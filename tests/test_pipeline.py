"""Which autoencoder a checkpoint, a stored latent and a structure file go with: its weights tell, not its path."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers import CHECKPOINT, refused, second_stage
from isonext.config import Config, config_to_dict
from isonext.data.autoencoder import load_autoencoder
from isonext.errors import UserError
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import load_codec, load_pipeline, settled

CPU = torch.device("cpu")
DIGEST = load_autoencoder("dct:f4c12", CPU).digest
HERE = ("--set", "autoencoder.name=dct")  # where the autoencoder of these tests "lies"


@pytest.fixture
def edited(studio):
    """A function: {entry of the spec: value, or None to take it out} -> a checkpoint like the studio's, so changed."""

    def edit(changes: dict) -> str:
        tree = torch.load(studio / CHECKPOINT, weights_only=True)
        tree["latents"] = {name: value for name, value in (tree["latents"] | changes).items() if value is not None}
        torch.save(tree, studio / "edited.pt")
        return "edited.pt"

    return edit


@pytest.fixture
def infer(within, studio):
    """Transfer a picture by a checkpoint; (status, stdout, stderr)."""
    styles = ("--source_style", "cold", "--target_style", "warm", "--num_steps", "2")

    def run(checkpoint, *flags, source="raw_data/cold/003.png"):
        return within("inference", "--checkpoint", checkpoint, "--input", source, "--output", "x.png", *styles, *flags)

    return run


def test_the_digest_travels_from_the_store_into_the_checkpoint(studio):
    assert json.loads((studio / "latents/meta.json").read_text())["latents"]["autoencoder_digest"] == DIGEST
    assert torch.load(studio / CHECKPOINT, weights_only=True)["latents"]["autoencoder_digest"] == DIGEST


def test_an_autoencoder_that_moved_is_given_by_set_and_makes_the_same_picture(infer, edited, studio):
    assert infer(CHECKPOINT)[0] == 0
    expected = (studio / "x.png").read_bytes()
    moved = edited({"autoencoder": "gone/vae"})
    refused(infer(moved), "autoencoder gone/vae", "give --set autoencoder.name= a local diffusers folder")
    (studio / "x.png").unlink()
    assert infer(moved, *HERE)[0] == 0
    assert (studio / "x.png").read_bytes() == expected
    pipeline, _ = load_pipeline(studio / moved, CPU, "dct")
    assert (pipeline.spec.autoencoder, pipeline.spec.autoencoder_digest) == ("dct:f4c12", DIGEST)


def test_an_autoencoder_given_by_set_is_checked(infer, within):
    refused(infer(CHECKPOINT, "--set", "autoencoder.name=dct:f4c13"), CHECKPOINT, "12-channel latents", "dct:f4c13")
    refused(infer(CHECKPOINT, "--set", "autoencoder.name=dct:f8c12"), CHECKPOINT, "4 pixels a cell", "has 8")
    refused(infer(CHECKPOINT, "--set", "autoencoder.name=3"), "autoencoder.name = 3", "a text")
    out = ("--output", "none", "--set", "autoencoder.name=dct:f4c13")
    refused(within("sample", "--checkpoint", CHECKPOINT, *out), CHECKPOINT, "12-channel latents")
    refused(within("evaluate", "--checkpoint", CHECKPOINT, *out), CHECKPOINT, "12-channel latents")


def test_other_weights_at_the_same_place_are_refused_and_unknown_ones_are_not(infer, edited):
    replaced = edited({"autoencoder_digest": "0" * 64})
    words = (
        f"{replaced}: trained on latents of the autoencoder dct:f4c12 (sha256 000000000000)",
        "other weights",
        DIGEST[:12],
    )
    refused(infer(replaced), *words)
    refused(infer(replaced, *HERE), *words)
    assert infer(edited({"autoencoder_digest": None}))[0] == 0, "as checkpoints were before"


def test_a_stored_latent_of_another_autoencoder_is_refused(infer, studio):
    shutil.copytree(studio / "latents", studio / "other")
    meta = json.loads((studio / "other/meta.json").read_text())
    entry = f"other/{meta['split']['train'][0]}"
    assert infer(CHECKPOINT, source=entry)[0] == 0
    meta["latents"]["autoencoder_digest"] = "0" * 64
    (studio / "other/meta.json").write_text(json.dumps(meta))
    refused(
        infer(CHECKPOINT, source=entry), entry, "other has autoencoder dct:f4c12 (sha256 000000000000)", DIGEST[:12]
    )


def test_a_stored_latent_is_only_of_the_store_in_whose_style_it_lies(infer, studio):
    """Other programs have files called meta.json, too, and other latents may lie in a store's folder."""
    shutil.copytree(studio / "latents", studio / "near")
    meta = json.loads((studio / "near/meta.json").read_text())
    entry = Path(f"near/{meta['split']['train'][0]}")
    (studio / entry.parent / "meta.json").write_text('{"name": "pictures"}')
    assert infer(CHECKPOINT, source=str(entry))[0] == 0
    meta["latents"]["autoencoder_digest"] = "0" * 64
    (studio / "near/meta.json").write_text(json.dumps(meta))
    refused(infer(CHECKPOINT, source=str(entry)), "near has autoencoder dct:f4c12 (sha256 000000000000)")
    (studio / "near/spare").mkdir()
    shutil.copy(studio / entry, studio / "near/spare/a.pt")
    assert infer(CHECKPOINT, source="near/spare/a.pt")[0] == 0


def test_a_structure_file_goes_back_where_the_autoencoder_moved_and_not_by_another_one(infer, within, edited, studio):
    moved = edited({"autoencoder": "gone/vae"})
    assert infer(moved, *HERE, "--save_structure", "x.safetensors")[0] == 0
    back = ("inference", "--checkpoint", moved, "--output", "back.png")
    assert within(*back, "--restore", "x.safetensors", *HERE)[0] == 0
    assert within(*back, "--from_structure", "x.safetensors", "--target_style", "0", *HERE)[0] == 0
    steps = ("--set", "inference.num_steps=3")
    refused(within(*back, "--restore", "x.safetensors", *HERE, *steps), "--set does not go with --restore")


def test_a_codec_without_a_name_is_the_specs(studio):
    pipeline, _ = load_pipeline(studio / CHECKPOINT, CPU)
    assert load_codec(pipeline.spec, CPU, "x.pt").digest == DIGEST
    with pytest.raises(UserError, match=r"x\.pt: trained on 12-channel latents, autoencoder dct:f4c5 gives 5"):
        load_codec(pipeline.spec, CPU, "x.pt", "dct:f4c5")


def test_the_map_of_stage_2_is_compiled_and_let_go_with_its_teacher(studio, monkeypatch, capsys):
    pipeline, _ = load_pipeline(second_stage(studio / CHECKPOINT, studio / "stage2_compiled.pt"), CPU)
    latents, how = torch.randn(1, 12, 4, 4), TransferSettings("map", 1, 1.0, 2.0)
    expected = pipeline.transfer(latents, 0, 1, how).latents

    def no_compiler(*_, **__):
        raise RuntimeError("no compiler here")

    for network in (pipeline.model, pipeline.map):
        monkeypatch.setattr(network, "compile", lambda network=network, **_: spoil(network))

    def spoil(network):
        for block in network.blocks:
            block._compiled_call_impl = no_compiler

    pipeline.compile()
    assert torch.equal(pipeline.transfer(latents, 0, 1, how).latents, expected)
    assert not pipeline.compiled and "no compiler here" in capsys.readouterr().err
    pipeline.transfer(latents, 0, 1, TransferSettings("alf", 1))


def test_the_map_runs_in_the_precision_of_the_pipeline(studio):
    pipeline, _ = load_pipeline(second_stage(studio / CHECKPOINT, studio / "stage2_precision.pt"), CPU)
    latents, how, found = torch.randn(1, 12, 4, 4), TransferSettings("map", 1, 1.0, 2.0), []
    for pipeline.bf16 in (False, True):
        found.append(pipeline.transfer(latents, 0, 1, how).latents)
    assert 1e-5 < (found[0] - found[1]).abs().max() < 0.2 * (found[0] - latents).abs().max()


@pytest.mark.parametrize(
    ("overrides", "flags", "steps"),
    [
        ([], {}, 1),
        ([], {"num_steps": 4}, 4),
        ([], {"method": "alf"}, 20),
        (["inference.method=heun"], {}, 20),
        (["inference.method=heun", "inference.num_steps=7"], {"cfg_scale": 3.0}, 7),
        (["inference.method=heun"], {"method": "map"}, 1),
    ],
)
def test_legs_in_place_of_the_map_have_the_usual_steps(overrides, flags, steps):
    tree = config_to_dict(Config())
    tree["inference"] |= {"method": "map", "num_steps": 1}
    assert settled(tree, overrides, flags).inference.num_steps == steps
    assert tree["inference"]["num_steps"] == 1
