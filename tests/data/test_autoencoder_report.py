"""`python -m isonext.data.autoencoder NAME`: what it prints is what the autoencoder is."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT, environment
from isonext.data.autoencoder import load_autoencoder
from isonext.data.autoencoder_report import describe
from isonext.data.demo_pictures import draw_scene
from small_vaes import SMALL, save_small

CPU = torch.device("cpu")


def cells_of(text):
    return {line[:14].strip(): line[14:] for line in text.splitlines()}


@pytest.mark.parametrize(
    ("name", "rule", "pixels", "pictures"),
    [
        ("KL", "(z - 0.1) x 0.3", "[-1, 1]", "of any size"),
        ("Flux2", "(z - bn.running_mean) / sqrt(bn.running_var + 0.0001)", "[-1, 1]", "of any size"),
        ("Wan", "(z - latents_mean) / latents_std", "[-1, 1]", "of any size"),
        ("RAE", "z", "[0, 1]", "32 x 32 pixels alone"),
    ],
)
def test_it_says_class_channels_factor_rule_and_quality(tmp_path, name, rule, pixels, pictures):
    codec = load_autoencoder(str(save_small(name, tmp_path / "vae")), CPU)
    kind, _, (channels, factor, side) = SMALL[name]
    said = cells_of(describe(codec, CPU))
    assert (said["class"], said["channels"], said["pixels a cell"]) == (kind, str(channels), str(factor))
    assert (said["latents"], said["its pixels"], said["pictures"]) == (rule, pixels, pictures)
    assert said["sha256"] == codec.digest
    side = side or 256
    picture = torch.tensor(np.array(draw_scene(0, "shaded", side)), dtype=torch.float32).permute(2, 0, 1)[None]
    rebuilt = (codec.decode(codec.encode(picture / 127.5 - 1)).clamp(-1, 1) + 1) * 127.5
    quality = 20 * math.log10(255) - 10 * math.log10((rebuilt - picture).square().mean().item())
    assert float(said["test picture"].split()[-2]) == pytest.approx(quality, abs=0.06)
    assert re.fullmatch(r"encode [\d.]+ ms, decode [\d.]+ ms, one picture on cpu", said["time"])


def test_it_is_a_command_with_one_line_errors():
    def run(name):
        command = [sys.executable, "-m", "isonext.data.autoencoder", name, "--device", "cpu"]
        return subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=100)

    done = run("dct:f4c48")
    assert done.returncode == 0 and cells_of(done.stdout)["class"] == "DctCodec"
    assert float(cells_of(done.stdout)["test picture"].split()[-2]) > 90
    bad = run("dct:f")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: autoencoder dct:f: ")
    assert bad.stderr.count("\n") == 1
