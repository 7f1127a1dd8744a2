"""Checkpoints of every published layout to diffusers' layout and back: keys, shapes and configs."""
