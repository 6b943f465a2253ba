"""What passes stand on: facts about nodes, what nodes call, and small changes to a graph."""
