"""From images to shards: scan, decode, preprocess, forward pass, encode and write, overlapped."""
