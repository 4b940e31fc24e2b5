"""This process: ended in time, and the room that it may use."""
