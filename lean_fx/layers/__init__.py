"""Layers of torch: rebuilt for fewer channels, told from subclasses, replaced by plain twins."""
