"""Data and settings to trained weights, stage by stage."""
