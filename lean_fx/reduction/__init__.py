"""The operator: LEAN as a function and as a module, the controls beside it, and their registry."""
