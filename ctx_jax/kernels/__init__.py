"""Programs for one kind of device, and what they and the compiler's own must draw alike."""
