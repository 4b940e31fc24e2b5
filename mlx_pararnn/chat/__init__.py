"""Conversations: the session in a terminal or program, stored states, the server."""
