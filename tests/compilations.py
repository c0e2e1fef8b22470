"""How many programs XLA has compiled so far in this process."""

import jax

_compiled = 0


def _count(event: str, seconds: float, **_) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
    """All of them, those found in the compile cache too."""
    return _compiled
