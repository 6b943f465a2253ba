"""Layers of torch rebuilt, told from subclasses or made plain, and some that graphs need."""
