"""Noisy latents, a time and a caption to the velocity of the flow."""
