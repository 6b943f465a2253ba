"""What a model costs: parameters, MACs, latency, energy; and the report that shows it."""
