"""Small files, written by the tests."""

import pytest


@pytest.fixture
def write(tmp_path):
    """Writes a file below the test's folder, gives its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
