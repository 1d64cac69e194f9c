"""Networks. Parameter names are those of the diffusers checkpoint format."""
