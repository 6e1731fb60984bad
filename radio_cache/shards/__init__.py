"""Shards: encoding, reading, batched reads, native reads, the cache of shard indexes."""
