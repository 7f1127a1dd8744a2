"""The mathematics of the angle t in [0, pi/2]: tensors go in, tensors come out, and no model is known here."""
