"""Output of the commands: help, tables, progress, errors."""
