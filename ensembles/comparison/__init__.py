"""Comparing models on the same items: intervals, tests and verdicts. Pure functions on arrays, seeded; numpy and scipy.

Figures belong to *items* (a question, a document): arrays are in the order of the items, and two models are compared
item by item. `paired` puts the parts together; each part is a module of its own.

References: Efron & Tibshirani, "An introduction to the bootstrap", 1993; Miller, "Adding error bars to evals",
https://arxiv.org/abs/2411.00640; Bowyer et al., "Don't use the CLT in LLM evals with fewer than a few hundred
datapoints", https://arxiv.org/abs/2503.01747
"""
