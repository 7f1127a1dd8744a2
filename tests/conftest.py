"""A whole pipeline of tiny random components, for every test that needs one or a part of it, and an offline world."""

import json
import os
from typing import Any

import pytest

# Before torch or the hub's client is imported: one thread for each test process, and nothing is ever fetched.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 32,
    "sample_size": 8,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
# Four stages: latents of one eighth of the pictures' size, so the tiny model is one of 64 pixels.
TINY_AUTOENCODER: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (4, 8, 8, 8),
    "decoder_block_out_channels": (4, 8, 8, 8),
    "encoder_layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,)),
    "scaling_factor": 0.41407,
}
TINY_VOCABULARY = 400
LEARNT_FROM = [
    "a tiny astronaut hatching from an egg on the moon",
    "a red circle left of a blue square, three yellow triangles above a small green star",
    "given a user prompt, generate an enhanced prompt that provides detailed visual descriptions",
]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A GemmaTokenizer with everything as published but its vocabulary, which it has learnt from three sentences."""
    from tokenizers.trainers import BpeTrainer
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = GemmaTokenizer()._tokenizer
    trainer = BpeTrainer(vocab_size=TINY_VOCABULARY, special_tokens=special + letters, show_progress=False)
    learner.train_from_iterator(LEARNT_FROM * 3, trainer)
    learnt = json.loads(learner.to_str())["model"]
    return GemmaTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], add_bos_token=True)


@pytest.fixture(scope="session")
def tiny_text_encoder(tiny_tokenizer):
    """A Gemma-2 of two layers and width 32, with random weights."""
    import torch
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=TINY_TRANSFORMER["caption_channels"],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,  # so that one prompt differs visibly from another
    )
    return Gemma2Model(config).eval()


@pytest.fixture(scope="session")
def tiny_pipeline_parts(tiny_tokenizer, tiny_text_encoder) -> dict[str, Any]:
    """The components of a SanaSprintPipeline, ours, by name. Not to be altered: every test of the session has them."""
    import torch

    from sana_sprint import AutoencoderDC, SanaTransformer2DModel, SCMScheduler

    torch.manual_seed(1)
    return {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_text_encoder,
        "vae": AutoencoderDC(**TINY_AUTOENCODER).eval(),
        "transformer": SanaTransformer2DModel(**TINY_TRANSFORMER).eval(),
        "scheduler": SCMScheduler(),
    }
