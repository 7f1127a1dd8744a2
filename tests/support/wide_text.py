"""A tiny text encoder that is wide enough for weights of 4 bits."""

import torch
from transformers import Gemma2Config, Gemma2Model


def wide_text_encoder(vocab_size: int) -> Gemma2Model:
    """Gemma-2 of two layers with random weights, the same each time."""
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.1,
    )
    return Gemma2Model(config).eval()
