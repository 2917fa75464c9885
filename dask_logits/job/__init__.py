"""The job around the teacher: its plan, its record on disk, its cluster, its driver."""
