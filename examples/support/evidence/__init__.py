"""What examples/evidence.py is made of: its nets, arms, runs and report."""
