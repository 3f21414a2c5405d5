"""How matrices are stored: `method` is what a format implements, `plain` and `fp8` are the formats, `config` reads the
checkpoint or the engine's setting."""
