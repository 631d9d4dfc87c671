"""Chats: templates from strangers are rendered in a process of bounded time and memory, and turned into tokens."""
