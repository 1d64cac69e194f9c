"""Sfumato: diffusion models as compositions. Public names load on first use; importing the package imports nothing heavy."""
