"""What of the policies and of the live loop takes long to compile, see ``engine.jit.warm``."""

from __future__ import annotations


def rules() -> None:
    from policies import registry

    for name in registry.names()[::2]:
        registry.get(name)


def more_rules() -> None:
    from policies import registry

    for name in registry.names()[1::2]:
        registry.get(name)


def networks() -> None:
    import policies.network.compiled
    import policies.network.guided  # noqa: F401


def live_loop() -> None:
    from policies.serve import Options, build

    engine, _ = build(Options("dummy:tiny", profile="smollm2-cpu"))  # it serves a request before it is handed out
    engine.close()


STAGES = ((rules, more_rules, networks), (live_loop,))
