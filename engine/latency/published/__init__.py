"""Profiles made from the figures of papers: tables, operator costs, and how a profile follows from them."""
