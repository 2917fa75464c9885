"""From dataset rows to targets: corpus, batches, teacher, scoring, and the task that does it for one partition."""
