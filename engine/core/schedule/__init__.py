"""What runs next: batches of a lane, order of prompts, preemption, predicted times."""
