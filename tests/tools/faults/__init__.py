"""The faults that faults.py tries, by kind."""
