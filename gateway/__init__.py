"""The HTTP face of Headrace: an OpenAI-compatible API, health and metrics, and a chat page; needs no torch."""
