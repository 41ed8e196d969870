"""From figures to verdicts: pairs, tests, the null check, flips."""
