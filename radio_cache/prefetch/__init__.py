"""Read ahead: ordered maps over threads, a ring of reused buffers, page-aligned memory."""
