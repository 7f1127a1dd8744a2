"""A checkpoint's configs and the memory at hand to the way to load it, with what every stage of a call will take."""
