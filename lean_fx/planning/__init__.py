"""What is reduced, where and to how many channels, or why not: policies, decisions and plans."""
