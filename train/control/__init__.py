"""Learning when to change roles: the search over days, and what train-policy makes of it."""
