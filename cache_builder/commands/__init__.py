"""The subcommands of `radio-cache`: each parses its options, calls one function and prints the result."""
