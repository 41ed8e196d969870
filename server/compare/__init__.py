"""A/B comparisons of models: `plan` what to compare, `arms` to compare, `run` the measures, `results` of them."""
