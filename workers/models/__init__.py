"""The decoder models: `registry` (families as data), `spec` (config.json), `decoder` (the one forward pass)."""
