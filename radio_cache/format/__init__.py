"""The format on disk: schema, documents, checksums, paths. A promise; see docs/format.md."""
