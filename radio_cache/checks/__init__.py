"""Checks of a store: checksums, presence of files, shards of low fidelity."""
