"""Every kind of autoencoder in small: what differs from a tiny one of three stages."""

from typing import Any

NO_SCALES: dict[str, Any] = {
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "shuffling": {},
    "sana": {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
    "lite": {
        "downsample_block_type": "Conv",
        "decoder_block_types": "ResBlock",
        "decoder_layers_per_block": (0, 2, 1),
        "decoder_conv_act_fn": "silu",
    },
    "in": {
        "encoder_layers_per_block": (0, 2, 1),
        "decoder_layers_per_block": (0, 1, 2),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu"),
        **NO_SCALES,
    },
    "zero_first_by_convolution": {
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (0, 1, 1),
    },
    "no_shortcuts": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "only_residual_blocks": {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"},
    "only_attention_blocks": {
        "encoder_block_types": "EfficientViTBlock",
        "decoder_block_types": "EfficientViTBlock",
        "decoder_norm_types": "batch_norm",
        "encoder_qkv_multiscales": ((5,), (), (3, 5)),
        "decoder_qkv_multiscales": ((), (3,), (5, 7)),
    },
    "other_activations": {"decoder_act_fns": "gelu", "decoder_conv_act_fn": "gelu"},
    "unequal_halves": {
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (16, 16, 64),
        "decoder_layers_per_block": (2, 1, 2),
    },
    "width_no_multiple_of_the_head": {"attention_head_dim": 12},
    "four_channels": {"in_channels": 4},
}
