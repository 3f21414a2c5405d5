"""Drafters that run in a worker and draft tokens with a second model."""
