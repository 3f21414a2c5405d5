"""The command line, `sempre`. Modules here import heavy packages inside the functions that need them."""
