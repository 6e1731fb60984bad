"""The commands of radio-eval, one per file. Each imports its evaluation when it runs: torch takes seconds to load."""
