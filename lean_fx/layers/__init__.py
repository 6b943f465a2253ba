"""The kinds of layers, how to rebuild each for fewer channels, and modules that graphs call."""
