"""Is the student any good? Evaluations that put teachers, the student and an untrained student side by side."""
