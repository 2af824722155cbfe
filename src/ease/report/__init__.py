"""Reports of runs: an HTML page, tables for a terminal, and a verdict."""

from ease.report.page import write_report
from ease.report.tables import decoding_sentence, decoding_table, evaluation_table, text_table
from ease.report.verdict import verdict

__all__ = ["decoding_sentence", "decoding_table", "evaluation_table", "text_table", "verdict", "write_report"]
