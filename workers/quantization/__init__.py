"""How matrices are stored: `method` is what a format implements, `plain` and `fp8` the formats, `config` what a
checkpoint or the engine's setting says."""
