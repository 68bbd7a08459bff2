"""What INT8 costs: criteria by their error, comparison, sensitivity, tuning."""
