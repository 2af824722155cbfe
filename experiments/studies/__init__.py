"""Single questions, each answered by one command or table."""
