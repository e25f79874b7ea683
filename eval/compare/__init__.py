"""A paired comparison: session, verdict, static plan, shadow run, table."""
