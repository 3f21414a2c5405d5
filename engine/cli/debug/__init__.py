"""`sempre debug …`: commands that look into a running server."""
