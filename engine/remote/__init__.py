"""Slalom as the router in front of engines nobody here wrote: what was sent and seen keeps the core's state of them.

Three threads of thought meet here. The scheduler's loop (``instances``) decides and books; the event loop (``fleet``,
``upstream``) talks to engines and clients, and passes every token on without asking anybody; and what it saw goes to
the scheduler in batches (``reports``).
"""
