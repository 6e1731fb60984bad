"""The student with its heads: adaptors, EMA, mosaics, files."""
