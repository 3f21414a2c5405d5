"""How matrices are stored: `method` is what a format implements, `plain`, `fp8` and `mxfp4` are the formats, `config`
reads the checkpoint or the engine's setting."""
