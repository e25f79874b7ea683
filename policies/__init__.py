"""Who decides: published rules, the learned network, checkpoints.

A rule is one short file that ends in ``RULE = Rule(...)``; ``registry`` finds it by its name. Nothing here
knows an environment, a learner or a server.
"""

from policies.load import load_policy
from policies.registry import get, names
from policies.rule import BoundPolicy, Param, Rule, Setting

__all__ = ["BoundPolicy", "Param", "Rule", "Setting", "get", "load_policy", "names"]
