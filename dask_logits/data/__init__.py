"""Rows of any dataset to items: the token sequences that the teacher reads."""
