"""Build shards in worker processes: a local pool, a Dask scheduler or a cluster."""
