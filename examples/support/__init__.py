"""What the example scripts and the tests share: nets, data sets, arms of experiments, the zoo."""
