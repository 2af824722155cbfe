"""Statistics, tables and figures of measured experiments."""
