"""Drafters that run in a worker: what drafts tokens with a second model."""
