"""A small random model of every picture autoencoder class of diffusers, as its own save_pretrained leaves it."""

from pathlib import Path

import torch

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VIDEO = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": MEAN, "latents_std": STD}
VIDEO |= {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
DC = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": (4, 8, 8),
    "decoder_block_out_channels": (4, 8, 8),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "scaling_factor": 0.41407,
}
HUNYUAN = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1}
HUNYUAN |= {"spatial_compression_ratio": 4}
RAE = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 4,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "patch_size": 8,
    "encoder_input_size": 16,
    "latents_mean": torch.linspace(-1, 1, 64 * 16).view(64, 4, 4),
    "latents_std": torch.linspace(0.5, 2, 64 * 16).view(64, 4, 4),
}

# Name -> class, arguments, and what must come of a picture: channels, pixels a cell, the one side or None.
SMALL = {
    "Asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (8, 16),
            "up_block_out_channels": (16, 16),
            "norm_num_groups": 4,
            "latent_channels": 3,
        },
        (3, 2, None),
    ),
    "DC": ("AutoencoderDC", DC, (8, 4, None)),
    "KL": ("AutoencoderKL", KL | {"latent_channels": 4, "scaling_factor": 0.3, "shift_factor": 0.1}, (4, 4, None)),
    "KL with lists": (
        "AutoencoderKL",
        KL | {"latent_channels": 4, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
        (4, 4, None),
    ),
    "Flux2": ("AutoencoderKLFlux2", KL | {"latent_channels": 3}, (12, 8, None)),
    "HunyuanImage": (
        "AutoencoderKLHunyuanImage",
        HUNYUAN | {"block_out_channels": (32, 32, 32), "sample_size": 64, "scaling_factor": 0.75},
        (4, 4, None),
    ),
    "HunyuanImageRefiner": (
        "AutoencoderKLHunyuanImageRefiner",
        HUNYUAN | {"block_out_channels": (8, 8, 16), "temporal_compression_ratio": 2},
        (4, 4, None),
    ),
    "KVAE": (
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1)},
        (4, 4, None),
    ),
    "Qwen": ("AutoencoderKLQwenImage", VIDEO, (4, 4, None)),
    "Qwen 2.1": ("AutoencoderKLQwenImage21", VIDEO | {"decoder_base_dim": 4}, (4, 4, None)),
    "TemporalDecoder": (
        "AutoencoderKLTemporalDecoder",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "block_out_channels": (32, 32),
            "latent_channels": 4,
            "layers_per_block": 1,
        },
        (4, 2, None),
    ),
    "Wan": ("AutoencoderKLWan", VIDEO, (4, 4, None)),
    "Wan 2.2": (
        "AutoencoderKLWan",
        VIDEO | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        (4, 8, None),
    ),
    "RAE": ("AutoencoderRAE", RAE, (64, 8, 32)),
    "Tiny": ("AutoencoderTiny", TINY | {"scaling_factor": 0.5}, (4, 2, None)),
    "VQ": ("VQModel", KL | {"latent_channels": 3, "num_vq_embeddings": 16}, (3, 4, None)),
}


def small_vae(name: str):
    """The random model, with statistics in its batch norm where it has one."""
    import diffusers

    kind, arguments, _ = SMALL[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**arguments).eval()
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, vae.bn.num_features))
        vae.bn.running_var.copy_(torch.linspace(0, 3, vae.bn.num_features))
    return vae


def save_small(name: str, folder: Path, **options) -> Path:
    small_vae(name).save_pretrained(folder, **options)
    return folder
