"""What people watch: progress on the terminal and the state of a run read from its files."""
