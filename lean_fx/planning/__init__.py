"""What is reduced, where and to how many channels, or why not: options, records, planner, Plan."""
