"""Read images: decode, containers, local and remote files, Parquet, the index, kept pixels."""
