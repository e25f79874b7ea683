"""What happened: arrivals, ends, hand-overs over links, role changes, cancellations."""
