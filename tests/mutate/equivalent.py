"""Drawn mutants that no test can notice, by their names, each with the reason."""

EQUIVALENT: dict[str, str] = {}
