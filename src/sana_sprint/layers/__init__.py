"""Modules and functions without configuration, shared by transformer and autoencoder."""
