"""k-nearest-neighbour classification of frozen summaries: search, votes, table."""
