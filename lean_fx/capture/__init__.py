"""A model becomes a torch.fx graph: traced, followed through branches, or kept whole in parts."""
