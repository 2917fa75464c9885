"""The state of a run, read from its files alone."""
