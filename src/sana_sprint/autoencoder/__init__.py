"""Pixels to latents and back: the deep-compression autoencoder (DC-AE)."""
