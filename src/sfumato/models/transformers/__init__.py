"""Transformers that denoise: one network a file."""
