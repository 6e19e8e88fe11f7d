"""Serving: an OpenAI-compatible server of this library, and the plugin of an engine for many users."""
