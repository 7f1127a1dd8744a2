"""Prompts to Gemma-2 embeddings and an attention mask."""
