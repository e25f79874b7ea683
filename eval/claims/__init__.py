"""Published results, set beside ours."""
