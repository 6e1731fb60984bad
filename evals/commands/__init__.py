"""The commands of radio-eval, one per file. They import what they run: torch takes seconds, and --help needs none of it."""
