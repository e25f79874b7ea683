"""Searches: over rules, arrangements and scores together, over one rule, over parameters; and how they are recorded."""
