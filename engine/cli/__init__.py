"""The command line, `sempre`. Modules here import what is heavy inside the functions that need it."""
