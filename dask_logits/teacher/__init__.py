"""Token sequences to targets: load a teacher, check its fast paths against its own forward, score."""
