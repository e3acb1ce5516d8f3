"""Drawn mutants that no test can notice, by their names, each with the reason."""

EQUIVALENT: dict[str, str] = {
    "0f4169": "w beyond the row multiplies a dy of 0 there, and nothing of it is stored",
    "668268": "without edges a row of pairs begins at a whole vector: the half pair more is rounded away by `aligned`",
    "7121e6": "the numbers that a norm is tried with may be those of any seed",
    "9d4f8b": "matrices without columns have strides that TMA does not take: the answer was given before K is asked for",
}
