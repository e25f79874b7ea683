"""One benchmark a file: a function ``run() -> dict`` whose keys end in the unit of their figure."""
