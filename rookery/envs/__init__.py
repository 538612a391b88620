"""Environments: one vector interface, three backends, and transforms."""
