"""A short walk through the verbs, for every Ray release that is supported."""
