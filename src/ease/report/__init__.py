"""The report of a run, or of several: an HTML page, text tables for a terminal, and a verdict."""

from ease.report.page import write_report
from ease.report.tables import decoding, decoding_table, text_table
from ease.report.verdict import verdict

__all__ = ["decoding", "decoding_table", "text_table", "verdict", "write_report"]
