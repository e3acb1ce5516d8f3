"""The report: pictures and one HTML page, drawn from the CSV and nothing else. Needs pandas and matplotlib."""

from .page import write_report

__all__ = ["write_report"]
