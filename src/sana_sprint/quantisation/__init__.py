"""Weights of 16 bits to weights of 8 or 4, on GPU and CPU, and adapters on them: what diffusers asks for."""
