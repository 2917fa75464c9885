"""Convert the rows of any dataset to items, the token sequences read by the teacher."""
