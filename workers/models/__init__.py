"""The models: `registry` (which file has which architecture), `config` (config.json), `base` (the stack of blocks), and
a file for each family."""
