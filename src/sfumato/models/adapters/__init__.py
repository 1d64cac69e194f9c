"""Networks that turn a picture into features for a denoiser."""
