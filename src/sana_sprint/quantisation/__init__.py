"""Weights of 16 bits to weights of 8 or 4, by bitsandbytes, on GPU and CPU: what diffusers asks when a model loads."""
