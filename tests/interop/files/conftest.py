"""What is asked of every reader, whatever the bytes are."""

import time
import tracemalloc

import pytest

from ctx_jax.errors import InputError


class Watch:
    """Reads files, and keeps how many were fine and the most that one took.

    Attributes:
      fine: files that were read.
      errors: the messages of the others.
      memory: bytes of Python's at the worst moment beyond the file's own size.
      seconds: of the processor, of the slowest file.
    """

    def __init__(self):
        self.fine, self.errors, self.memory, self.seconds = 0, [], 0, 0.0

    def __call__(self, read, path, content, *, values=True):
        """The tensors with their values, or None where the reader raised InputError; anything else goes through."""
        path.write_bytes(content)
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            found = read(path)
            found = {name: (tensor, tensor.read()) for name, tensor in found.items()} if values else found
            self.fine += 1
        except InputError as error:
            self.errors.append(str(error))
            found = None
        self.seconds = max(self.seconds, time.process_time() - began)
        self.memory = max(self.memory, tracemalloc.get_traced_memory()[1] - before - len(content))
        return found


@pytest.fixture
def watch():
    """Traces every call; at the end, messages are of one line, and no file took a second or a megabyte beside it."""
    tracemalloc.start()
    try:
        watch = Watch()
        yield watch
    finally:
        tracemalloc.stop()
    assert all(len(error.splitlines()) == 1 for error in watch.errors)
    assert watch.memory < 2**20
    assert watch.seconds < 1
