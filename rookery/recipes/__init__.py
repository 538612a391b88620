"""Tuned settings, as data: one TOML file a system, one table an environment."""
