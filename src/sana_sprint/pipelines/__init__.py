"""A prompt goes in, a picture comes out: the stages in order, each of which does its own work elsewhere."""
