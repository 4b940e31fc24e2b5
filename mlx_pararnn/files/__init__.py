"""Model folders: found on disk or on the hub, their small files read, their weights told apart."""
