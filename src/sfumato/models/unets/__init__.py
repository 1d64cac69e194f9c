"""U-shaped denoisers."""
