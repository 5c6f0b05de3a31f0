"""Prompts: tokens, embeddings, expansion."""
