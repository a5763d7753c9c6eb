"""The layer atlas: what each layer of an encoder knows, how its space is shaped, and which one to use."""
