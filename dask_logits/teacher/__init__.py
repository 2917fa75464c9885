"""Load a teacher, check its fast paths against its own forward, and score token sequences."""
