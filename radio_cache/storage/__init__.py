"""Where a cache lies: a local disk or a bucket."""
