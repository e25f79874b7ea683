"""What a decision was based on, and what a policy does in general."""
