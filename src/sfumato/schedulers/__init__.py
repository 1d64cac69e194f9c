"""Sampling algorithms."""
