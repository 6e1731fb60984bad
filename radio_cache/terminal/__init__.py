"""What the commands print: help, tables, progress, errors."""
