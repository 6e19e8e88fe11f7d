"""What makes the streams differ, one way a file. Each gives `attach(...)`, which adds its parameters, initialised."""
