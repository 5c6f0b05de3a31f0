"""Measuring the ops on a card: correctness, times beside other ways to compute the same, and the choice of configurations."""
