"""Configurations. A variant is `base.get_config()` and a few changed lines."""
