"""What JAX tells while it traces and compiles."""

import contextlib

import jax


@contextlib.contextmanager
def durations():
    """A list to which, within the context, every timed event of JAX is added: (event, function or None)."""
    events = []

    def listen(event, seconds, **about):
        events.append((event, about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled(events):
    """The functions that were compiled."""
    return [function for event, function in events if event == "/jax/core/compile/backend_compile_duration"]
