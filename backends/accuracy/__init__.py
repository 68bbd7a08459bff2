"""What quantization costs in a model's own output, for every backend: comparison, choice of criteria, tuning.

Nothing here knows a framework. A backend supplies functions that run its models.
"""
