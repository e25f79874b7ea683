"""The learned network: its features, normalisation, torch form and compiled form."""
