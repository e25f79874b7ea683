"""Fixed arrangements: which is best, replanned or not."""
