"""Pipelines: family, task, adapters and guidance, composed around one denoising loop."""
