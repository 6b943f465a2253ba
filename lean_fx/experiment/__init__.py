"""Training, ablations and their reports; needs the extra ``lean_fx[examples]``."""
