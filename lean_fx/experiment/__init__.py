"""Nets, data sets and training for the examples; needs the extra ``lean_fx[examples]``."""
