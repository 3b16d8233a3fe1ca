"""The broker: one process, one thread, one poll loop around a pure core. No torch, no text."""
